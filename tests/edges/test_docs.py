"""What the documents say of the program is so."""

import re
from pathlib import Path

import pytest

from deca_node import errors

ROOT = Path(__file__).parents[2]


def error_classes(base=errors.DecaError):
    for one in base.__subclasses__():
        yield one
        yield from error_classes(one)


def test_each_exit_code_has_its_place_in_the_documents():
    """In the table and with a section; and no code is documented that there is not."""
    page = (ROOT / "docs" / "errors.md").read_text()
    sections = {int(code) for code in re.findall(r"^## (\d+):", page, re.MULTILINE)}
    listed = {int(code) for code in re.findall(r"^\| \[?(\d+)\b", page, re.MULTILINE)}
    codes = {one.exit_code for one in error_classes() if not issubclass(one, errors.PeerError)}
    assert sections == codes | {1, 130}
    assert listed == sections | {0}


def test_the_reference_of_the_services_is_that_of_the_contract():
    """`make protos` was run after node.proto was changed."""
    pytest.importorskip("grpc_tools", reason="the extra [dev] is not installed")
    from protos.reference import reference

    assert (ROOT / "docs" / "api.md").read_text() == reference(ROOT / "protos")


@pytest.mark.parametrize(
    "page", [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))], ids=lambda p: p.name
)
def test_links_between_documents_lead_somewhere(page):
    """Files and headings that a page points to are there."""
    for target in re.findall(r"\]\(([^)\s]+)\)", page.read_text()):
        if target.startswith(("http://", "https://")):
            continue
        name, _, anchor = target.partition("#")
        other = page.parent / name if name else page
        assert other.exists(), target
        if anchor and other.suffix == ".md":
            headings = re.findall(r"^#+ (.*)$", other.read_text(), re.MULTILINE)
            slugs = {re.sub(r"[^\w\- ]", "", one.lower()).replace(" ", "-") for one in headings}
            assert anchor in slugs, target
