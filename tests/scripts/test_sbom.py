"""scripts/sbom: the required fields of CycloneDX 1.5, for all that is locked."""

from __future__ import annotations

import json
import re
import uuid

import pytest
from tests.scripts.loading import load_script

sbom = load_script("sbom")
NOW = 1_790_000_000.0
LOCK = (
    "# comment\npackaging==0.0.1\nPy_Yaml==6.0 \\\n    --hash=sha256:"
    + "a" * 64
    + " --hash=sha512:"
    + "b" * 128
)


def made(lock: str = LOCK) -> dict:
    return sbom.bill(lock, version="0.1.0", now=NOW)


def test_required_fields():
    bill = sbom.bill(sbom.LOCK.read_text(), version=sbom.own_version(), now=NOW)
    assert (bill["bomFormat"], bill["specVersion"], bill["version"]) == ("CycloneDX", "1.5", 1)
    assert uuid.UUID(bill["serialNumber"].removeprefix("urn:uuid:"))
    assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\dZ", bill["metadata"]["timestamp"])
    own = bill["metadata"]["component"]
    assert (own["type"], own["name"]) == ("application", "quire") and own["version"]
    components = bill["components"]
    pinned = [line for line in sbom.LOCK.read_text().splitlines() if line and line[0] != "#"]
    assert len(components) == len(pinned) > 30
    for each in components:
        assert each["type"] == "library" and each["name"] and each["version"], each
        assert each["purl"] == f"pkg:pypi/{each['name']}@{each['version']}" == each["bom-ref"]
        for licence in each.get("licenses", ()):
            assert licence.keys() in ({"expression"}, {"license"}), each
            assert "expression" in licence or licence["license"].keys() <= {"id", "name"}
    references = [own["bom-ref"], *(each["bom-ref"] for each in components)]
    assert len(set(references)) == len(references)
    for each in bill["dependencies"]:
        assert each["ref"] in references and set(each["dependsOn"]) <= set(references)
    assert json.loads(json.dumps(bill)) == bill


def test_most_of_what_is_installed_has_a_licence_and_its_dependencies():
    bill = sbom.bill(sbom.LOCK.read_text(), version="0", now=NOW)
    installed = [c for c in bill["components"] if sbom.installed(c["name"], c["version"])]
    assert sum("licenses" in each for each in installed) > 0.9 * len(installed)
    tree = {each["ref"].partition("@")[0]: each["dependsOn"] for each in bill["dependencies"]}
    assert any(ref.startswith("pkg:pypi/starlette@") for ref in tree["pkg:pypi/fastapi"])


def test_hashes_of_the_lock_are_kept_and_none_is_invented():
    packaging, pyyaml = made()["components"]
    assert pyyaml["name"] == "py-yaml" and pyyaml["hashes"] == [
        {"alg": "SHA-256", "content": "a" * 64}, {"alg": "SHA-512", "content": "b" * 128},
    ]  # fmt: skip
    assert "hashes" not in packaging
    assert "licenses" not in packaging, "another version is installed"


def test_the_same_lock_gives_the_same_bill():
    assert made() == made() and made()["serialNumber"] != made(LOCK + "\nx==1")["serialNumber"]


@pytest.mark.parametrize("line", ["torch", "torch>=2", "-r other.txt", "git+https://x/y"])
def test_a_line_that_pins_nothing_is_an_error(line):
    with pytest.raises(ValueError, match="pins no version"):
        made(line)


def test_the_command(capsys, monkeypatch):
    monkeypatch.setenv("SOURCE_DATE_EPOCH", "1790000000")
    assert sbom.main() == 0
    said = capsys.readouterr()
    assert json.loads(said.out)["components"]
    assert "without hashes" in said.err
