"""Options of adapters: how modules are written, and which combinations work."""

from __future__ import annotations

from pathlib import Path

import pytest

from quire.cli.serve import configs
from quire.config import from_flat
from quire.config.lora import AdapterModule, LoRAConfig
from quire.errors import ConfigError


def test_modules_in_every_form(tmp_path: Path) -> None:
    sql, poems = AdapterModule("sql", "/a=b/sql"), AdapterModule("org/poems", "p", "base")
    as_json = '{"name": "org/poems", "path": "p", "base_model_name": "base"}'
    flags = ["--enable-lora", "--lora-modules", "sql=/a=b/sql", as_json]
    assert configs(flags)[0].lora.modules == [sql, poems]
    both = f'[{{"name": "sql", "path": "/a=b/sql"}}, {as_json}]'
    assert configs(["--enable-lora", "--lora-modules", both])[0].lora.modules == [sql, poems]
    path = tmp_path / "c.yaml"
    path.write_text(
        "enable-lora: true\nlora-modules:\n  - sql=/a=b/sql\n"
        "  - {name: org/poems, path: p, base_model_name: base}\n"
    )
    assert configs(["--config", str(path)])[0].lora.modules == [sql, poems]
    values = {"enable_lora": True, "lora_modules": [{"name": "sql", "path": "/a=b/sql"}]}
    assert from_flat(values).lora.modules == [sql]


@pytest.mark.parametrize(
    "text",
    [
        "", "sql", "=path", "sql=", "../sql=p", ".sql=p", "a/b/c=p", "a b=p", "a@1=p", "{", "{}",
        '{"name": "a"}', '{"name": 1, "path": "p"}', '{"name": "a", "path": "p", "rank": 3}',
        "é=p", f"{'x' * 129}=p",
    ],
)  # fmt: skip
def test_a_malformed_module(text: str) -> None:
    with pytest.raises(ConfigError, match=r"adapter|lora_modules"):
        LoRAConfig(enable_lora=True, lora_modules=(text,))


def test_what_works_together() -> None:
    assert LoRAConfig(max_loras=3).capacity == 12
    assert LoRAConfig(max_loras=3, max_cpu_loras=3).capacity == 3
    for rank in (1, 7, 320, 512):
        assert LoRAConfig(max_lora_rank=rank).max_lora_rank == rank
    for name, wrong in (
        ("max_cpu_loras", {"max_loras": 3, "max_cpu_loras": 2}),
        ("max_loras", {"max_loras": 0}),
        ("max_lora_rank", {"max_lora_rank": 513}),
        ("max_lora_rank", {"max_lora_rank": 0}),
        ("lora_dir", {"lora_dir": ("/a",)}),
        ("lora_modules", {"lora_modules": ("a=b",)}),
        ("twice", {"enable_lora": True, "lora_modules": ("a=b", "a=c")}),
    ):
        with pytest.raises(ConfigError, match=name):
            LoRAConfig(**wrong)
