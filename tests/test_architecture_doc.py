"""The architecture page and the decision records say what is on disk, and their numbers are the code's."""

from __future__ import annotations

import ast
import re
import tomllib
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path

import pytest

from quire.kvcache import KVCacheManager
from quire.messages import SampledRow, StepPlan, StepResult
from quire.scheduler import Scheduler, SchedulerLimits
from quire.scheduler.invariants import check_invariants
from tests.scheduler.requests import add_request

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"
PACKAGE = ROOT / "src" / "quire"
PAGE = DOCS / "architecture.md"
RECORDS = sorted((DOCS / "adr").glob("*.md"))
OURS = [PAGE, DOCS / "README.md", *RECORDS]
ALL_PAGES = sorted({*DOCS.rglob("*.md"), *ROOT.glob("*.md")})

FENCE = re.compile(r"^```.*?^```$", re.M | re.S)
CODE = re.compile(r"`([^`\n]+)`")
LINK = re.compile(r"\[[^\]\n]*\]\(([^)\s]+)\)")
FILE = re.compile(r"[\w.-]+\.(?:py|c|h|md|toml)")


def prose(page: Path) -> str:
    """The page without its fenced blocks."""
    return FENCE.sub("", page.read_text(encoding="utf-8"))


def name_of(page: Path) -> str:
    return str(page.relative_to(ROOT))


# --- folders, paths, names ------------------------------------------------------------------------


def packages() -> list[str]:
    folders = {marker.parent for marker in PACKAGE.rglob("__init__.py")} - {PACKAGE}
    return sorted(f"{folder.relative_to(PACKAGE)}/" for folder in folders)


@pytest.mark.parametrize("package", packages())
def test_every_package_is_on_the_page(package: str) -> None:
    assert f"`{package}`" in PAGE.read_text(encoding="utf-8")


def paths(page: Path) -> Iterator[str]:
    """What is written like a path: it has a slash or a file's ending, no space, and does not begin with
    a slash (those are routes)."""
    for word in CODE.findall(prose(page)):
        if not re.fullmatch(r"[\w./*-]+", word) or word.startswith("/"):
            continue
        if "/" in word or FILE.fullmatch(word):
            yield word


@pytest.mark.parametrize("page", OURS, ids=name_of)
def test_every_path_exists(page: Path) -> None:
    missing = [
        word
        for word in paths(page)
        if not any(list(base.glob(word.rstrip("/"))) for base in (ROOT, PACKAGE, DOCS))
    ]
    assert not missing


def test_every_route_is_served() -> None:
    server = "".join(file.read_text(encoding="utf-8") for file in (PACKAGE / "server").glob("*.py"))
    routes = [word for word in CODE.findall(prose(PAGE)) if re.fullmatch(r"/[\w/]+", word)]
    assert routes
    assert [route for route in routes if f'"{route}"' not in server] == []


def test_the_step_is_the_code() -> None:
    (block,) = re.findall(r"^```python\n(.*?)^```$", PAGE.read_text(encoding="utf-8"), re.M | re.S)
    code = (PACKAGE / "engine" / "core.py").read_text(encoding="utf-8")
    assert "".join(f"        {line}\n" for line in block.splitlines()) in code


@cache
def classes() -> dict[str, set[str]]:
    """Class name -> what its body defines, all modules together."""
    found: dict[str, set[str]] = {}
    for file in PACKAGE.rglob("*.py"):
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if isinstance(node, ast.ClassDef):
                members = {
                    inner.name for inner in ast.walk(node) if isinstance(inner, ast.FunctionDef)
                }
                members |= {
                    item.target.id
                    for item in node.body
                    if isinstance(item, ast.AnnAssign) and isinstance(item.target, ast.Name)
                }
                members |= {
                    target.attr
                    for inner in ast.walk(node)
                    if isinstance(inner, ast.Assign)
                    for target in inner.targets
                    if isinstance(target, ast.Attribute)
                }
                found.setdefault(node.name, set()).update(members)
    return found


def test_every_class_and_member_exists() -> None:
    unknown = []
    for word in CODE.findall(prose(PAGE)):
        match = re.fullmatch(r"([A-Z][A-Za-z]*[a-z][A-Za-z]*)(?:\.(\w+))?(?:\(.*\))?", word)
        if match is None:
            continue
        members = classes().get(match[1])
        if members is None or (match[2] is not None and match[2] not in members):
            unknown.append(word)
    assert not unknown


def test_the_layer_table_is_the_contract() -> None:
    """The rows, top to bottom, are `pyproject.toml`'s layers less what is not written yet."""
    config = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    (contract,) = (c for c in config["tool"]["importlinter"]["contracts"] if c["id"] == "layers")
    layers = [
        {name for name in re.findall(r"\w+", layer) if exists(name)} for layer in contract["layers"]
    ]
    while "decoding" not in layers[-1]:  # the same level in words, some lines of the linter's
        lowest = layers.pop()
        layers[-1] |= lowest
    rows = re.findall(r"^\| \d \| (.*?) \|", PAGE.read_text(encoding="utf-8"), re.M)
    shown = [{re.sub(r"/$|\.py$", "", word) for word in CODE.findall(row)} for row in rows]
    assert shown == layers


def exists(module: str) -> bool:
    return (PACKAGE / module / "__init__.py").is_file() or (PACKAGE / f"{module}.py").is_file()


READING_PATH = 2_500
"""Most lines that a newcomer is asked to read."""


def test_the_reading_path_is_short() -> None:
    _, section = PAGE.read_text(encoding="utf-8").split("## Where to start reading")
    files = [
        word for line in re.findall(r"^\d\. .*$", section, re.M) for word in CODE.findall(line)
    ]
    paths = [PACKAGE / word for word in files if FILE.search(word)]
    lines = sum(len(path.read_text(encoding="utf-8").splitlines()) for path in paths)
    (stated,) = re.findall(r"^About ([\d,]+) lines", section, re.M)
    assert len(paths) > 5 and lines <= READING_PATH
    assert abs(int(stated.replace(",", "")) - lines) <= 200


# --- decision records and links -------------------------------------------------------------------


def test_records_are_numbered_without_gaps() -> None:
    numbers = [int(path.name[:4]) for path in RECORDS]
    assert numbers == list(range(1, len(numbers) + 1))


@pytest.mark.parametrize("record", RECORDS, ids=name_of)
def test_a_record_has_its_three_parts(record: Path) -> None:
    text = record.read_text(encoding="utf-8")
    assert re.match(rf"# {record.name[:4]}: \S", text)
    assert re.findall(r"^## (.*)$", text, re.M) == ["Context", "Choice", "Rejected"]
    assert all(part.strip() for part in re.split(r"^## .*$", text, flags=re.M)[1:])
    assert len(text.splitlines()) <= 60


def test_the_index_lists_every_record() -> None:
    index = (DOCS / "README.md").read_text(encoding="utf-8")
    assert [record.name for record in RECORDS if f"(adr/{record.name})" not in index] == []


def slugs(page: Path) -> set[str]:
    """Anchors as GitHub makes them."""
    headings = re.findall(r"^#+ (.*)$", prose(page), re.M)
    return {re.sub(r"[^\w\- ]", "", h.lower()).replace(" ", "-") for h in headings}


@pytest.mark.parametrize("page", ALL_PAGES, ids=name_of)
def test_links_between_pages_resolve(page: Path) -> None:
    broken = []
    for target in LINK.findall(prose(page)):
        if re.match(r"[a-z]+:", target):
            continue
        path, _, anchor = target.partition("#")
        file = (page.parent / path).resolve() if path else page
        if not file.exists() or (anchor and anchor not in slugs(file)):
            broken.append(target)
    assert not broken


# --- the numbers ----------------------------------------------------------------------------------

PROMPT = list(range(46))


class Story:
    """Runs the real scheduler and cache on made-up tokens, and tells what each step did."""

    def __init__(self, *, num_blocks: int, budget: int, max_model_len: int = 64) -> None:
        limits = SchedulerLimits(
            max_num_seqs=4, max_num_batched_tokens=budget, max_model_len=max_model_len
        )
        cache = KVCacheManager(num_blocks, 16, enable_prefix_caching=True)
        self.scheduler = Scheduler(limits, cache, clock=lambda: 0.0)
        self.lines = ["step  request  tokens    block table  num_computed_tokens  num_tokens  note"]

    def add(self, name: str, prompt: list[int], *, max_tokens: int, fork_of: str = "") -> None:
        self.scheduler.add_request(
            add_request(
                ord(name),
                prompt,
                max_tokens=max_tokens,
                arrival_time=float(ord(name)),
                fork_of=ord(fork_of) if fork_of else None,
            )
        )

    def step(self) -> None:
        scheduler = self.scheduler
        plan = scheduler.schedule()
        live = dict(scheduler.requests)
        tables = {row.request_id: scheduler.kv.block_ids(row.request_id) for row in plan.rows}
        known = {request_id: len(request.token_ids) for request_id, request in live.items()}
        sampled = [
            SampledRow(request_id=row.request_id, token_ids=[1000 + row.start + row.num_tokens])
            for row in plan.rows
            if row.samples
        ]
        result = StepResult(step_id=plan.step_id, sampled=sampled)
        updates = {u.request_id: u for u in scheduler.update(plan, result)}
        for row in sorted(plan.rows, key=lambda row: row.request_id):
            update = updates.get(row.request_id)
            note = self.note(plan, row.request_id)
            if update is not None:
                note.append("samples")
                if update.finish_reason is not None:
                    note.append(f"ends: {update.finish_reason.value}")
            request = live[row.request_id]
            self.lines.append(
                f"{plan.step_id:>3}   {chr(row.request_id):<7}  "
                f"{f'{row.start} to {row.start + row.num_tokens - 1}':<9} "
                f"{' '.join(map(str, tables[row.request_id])):<12} "
                f"{f'{row.start} -> {request.num_computed_tokens}':<20} "
                f"{known[row.request_id]:<11} {', '.join(note)}".rstrip()
            )
        for request in scheduler.waiting:
            why = scheduler.why_waits(request).reason.value
            self.lines.append(
                f"{plan.step_id:>3}   {chr(request.request_id):<7}  -         -            "
                f"{request.num_computed_tokens:<20} {request.num_tokens:<11} "
                f"{request.status.value}: {why}"
            )
        check_invariants(scheduler)

    @staticmethod
    def note(plan: StepPlan, request_id: int) -> list[str]:
        for admitted in plan.admitted:
            if admitted.request_id == request_id:
                copies = [f"copy {a} to {b}" for a, b in plan.copies if b in admitted.block_ids[0]]
                return ["admitted", *copies]
        return []

    def run(self, most: int = 60) -> Story:
        while self.scheduler.requests and most:
            self.step()
            most -= 1
        return self


def life() -> Story:
    story = Story(num_blocks=9, budget=32)
    story.add("A", PROMPT, max_tokens=4)
    story.step()
    story.add("B", [*PROMPT[:36], 900, 901, 902], max_tokens=2)
    return story.run()


def fork() -> Story:
    story = Story(num_blocks=9, budget=64)
    story.add("A", PROMPT, max_tokens=3)
    story.add("B", PROMPT, max_tokens=3, fork_of="A")
    return story.run(3)


def burst() -> Story:
    story = Story(num_blocks=9, budget=128)
    story.add("A", PROMPT[:32], max_tokens=2)
    story.add("B", PROMPT[:32], max_tokens=2)
    story.step()
    story.add("C", PROMPT[:32], max_tokens=2)
    story.step()
    return story


def quantum() -> Story:
    story = Story(num_blocks=20, budget=32, max_model_len=128)
    text = list(range(78))
    story.add("A", text, max_tokens=2)
    story.step()
    story.add("B", list(range(900, 906)), max_tokens=2)
    story.add("C", [*text[:48], 930, 931, 932], max_tokens=2)
    return story.run()


def preemption() -> Story:
    story = Story(num_blocks=6, budget=64)
    story.add("A", list(range(31)), max_tokens=4)
    story.add("B", list(range(100, 131)), max_tokens=4)
    return story.run()


@pytest.mark.parametrize(
    "tell", [life, fork, burst, preemption, quantum], ids=lambda tell: tell.__name__
)
def test_the_numbers_are_what_the_scheduler_does(tell: Callable[[], Story]) -> None:
    pattern = rf"^<!-- {tell.__name__} -->\n```text\n(.*?)^```$"
    (shown,) = re.findall(pattern, PAGE.read_text(encoding="utf-8"), re.M | re.S)
    assert shown.splitlines() == tell().lines
