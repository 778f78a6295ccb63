"""What the documents say of the program is so."""

import itertools
import re
import shlex
from pathlib import Path

import pytest
import typer
import yaml

from deca_node import cli, errors

ROOT = Path(__file__).parents[2]
PAGES = [
    ROOT / "README.md",
    *sorted((ROOT / "docs").glob("*.md")),
    *sorted((ROOT / "docs" / "errors").glob("*.md")),
]


def error_classes(base=errors.DecaError):
    for one in base.__subclasses__():
        yield one
        yield from error_classes(one)


def test_each_exit_code_has_its_place_in_the_documents():
    """In the table and with a page; and no code is documented that there is not."""
    table = (ROOT / "docs" / "errors.md").read_text()
    listed = {int(code) for code in re.findall(r"^\| \[?(\d+)\b", table, re.MULTILINE)}
    pages = {int(page.stem): page.read_text() for page in (ROOT / "docs" / "errors").iterdir()}
    codes = {one.exit_code for one in error_classes() if not issubclass(one, errors.PeerError)}
    assert set(pages) == codes | {1, 130}
    assert listed == set(pages) | {0}
    for code, page in pages.items():
        assert page.startswith(f"# Exit code {code}: ")


def test_the_reference_of_the_services_is_that_of_the_contract():
    """`make protos` was run after node.proto was changed."""
    pytest.importorskip("grpc_tools", reason="the extra [dev] is not installed")
    from protos.reference import reference

    assert (ROOT / "docs" / "api.md").read_text() == reference(ROOT / "protos")


def commands():
    """Each line that a page tells to type, with the page's name; continued lines are one."""
    for page in PAGES:
        for typed in re.findall(r"^\$ (.*(?:\\\n.*)*)$", page.read_text(), re.MULTILINE):
            yield page.name, typed.replace("\\\n", " ")


def test_each_command_of_the_documents_is_one():
    """Its verb and its options exist, also where nothing here can run it (systemd, a cluster)."""
    root = typer.main.get_command(cli.app)
    seen = set()
    for page, typed in commands():
        for found in re.finditer(r"(?:^|[\s/])deca-node (?=[a-z])([^|;&>]*)", typed):
            words = shlex.split(found[1], comments=True)
            if "docker" in typed and words[0] not in root.commands:
                continue  # an image or a service of that name
            command, path = root, []
            while hasattr(command, "commands"):
                path.append(words.pop(0))
                assert path[-1] in command.commands, f"{page}: {typed}"
                command = command.commands[path[-1]]
            parser = command.make_parser(command.context_class(command, info_name=path[-1]))
            parser.parse_args(words)  # raises NoSuchOption
            seen.add(" ".join(path))
    assert len(seen) > 15


def test_what_the_documents_say_to_compose_exists():
    """Profiles, services and volumes' places; the containers' test runs what can run here."""
    stack = yaml.safe_load((ROOT / "compose" / "docker-compose.yml").read_text())
    services = stack["services"]
    profiles = {one for service in services.values() for one in service.get("profiles", ())}
    count = 0
    for _, typed in commands():
        if "docker compose" not in typed:
            continue
        count += 1
        words = shlex.split(typed)
        assert (ROOT / words[words.index("-f") + 1]).exists()
        named = {b for a, b in itertools.pairwise(words) if a == "--profile"}
        assert named <= profiles | {"*"}, typed
        for verb, part in (("exec", 1), ("run", 2), ("cp", 1)):
            if verb in words:
                service = words[words.index(verb) + part].partition(":")[0]
                assert service in services, typed
    assert count > 8


@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.name)
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
