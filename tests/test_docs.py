"""README.md and docs/ are true: their commands, help texts, output, links and code.

Run as a program with ``--write``, this brings the help texts and refusals in docs/reference.md up to date.
"""

from __future__ import annotations

import ast
import contextlib
import json
import re
import shlex
import subprocess
import sys
import time
import tomllib
from collections.abc import Callable, Iterator
from pathlib import Path

import click
import httpx
import pytest
from click.testing import CliRunner

# As a program too: the relay as it stands here, not the copy that pip installed.
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import sse_relay
from benchmark.__main__ import main as benchmark
from harness import PROGRAM, Database, Relay, Server, parse_command, require
from pages import FENCE, ROOT, anchors, block, blocks, pages, prose
from simulation.command import command as simulation
from sse_relay import KIB, MIB, apply_schema, cli, read_key, verify_token

REFERENCE = "docs/reference.md"
HELP_WIDTH = 100
# What --write writes between two marks in the reference.
GENERATED = r"(?<=<!-- {0} -->\n).*?(?=<!-- /{0} -->)"


def help_text(*command: str) -> str:
    done = CliRunner().invoke(cli, [*command, "--help"], prog_name="sse_relay.py", terminal_width=HELP_WIDTH)
    assert done.exit_code == 0, done.output
    return done.output


def help_section() -> str:
    """Return what stands between the reference's help marks: a block for each command."""
    order = sorted(cli.commands, key=lambda name: (name != "run", name))
    return "".join(f"\n### `{name}`\n\n```text\n{help_text(name)}```\n" for name in order) + "\n"


def reason_text(node: ast.expr, constants: dict[str, str]) -> str:
    """Return the text of a refusal's reason, with an ellipsis for what differs."""
    match node:
        case ast.Constant(value=str(text)):
            return text
        case ast.JoinedStr(values=parts):
            return "".join(reason_text(part, constants) for part in parts)
        case ast.Name(id=name) if name in constants:
            return constants[name]
        case _:
            return "…"


def refusals_section() -> str:
    """Return what stands between the reference's refusal marks: a table made from the program's text."""
    module = ast.parse(PROGRAM.read_text())
    constants: dict[str, str] = {}
    found: set[tuple[int, str]] = set()
    for node in ast.walk(module):
        match node:
            case ast.Assign(targets=[ast.Name(id=name)], value=ast.Constant(value=str(text))):
                constants[name] = text
            case ast.AnnAssign(target=ast.Name(id=name), value=ast.Constant(value=str(text))):
                constants[name] = text
    for node in ast.walk(module):
        match node:
            case ast.Call(
                func=ast.Name(id="RefusedError"), args=[ast.Constant(value=int(status)), reason, *_]
            ):
                found.add((status, reason_text(reason, constants)))
    assert len(found) > 20
    rows = "".join(f"| {status} | `{reason}` |\n" for status, reason in sorted(found))
    return f"| status | reason |\n|---|---|\n{rows}"


def with_current_text(text: str) -> str:
    for mark, section in (("help", help_section()), ("refusals", refusals_section())):
        text, count = re.subn(GENERATED.format(mark), lambda _: section, text, flags=re.DOTALL)  # noqa: B023
        assert count == 1, f"the reference has lost its marks <!-- {mark} --> and <!-- /{mark} -->"
    return text


def test_the_generated_text_is_current() -> None:
    text = pages()[REFERENCE]
    assert text == with_current_text(text), "run: python tests/test_docs.py --write"


def test_each_page_can_be_read_in_one_sitting() -> None:
    lines = {page: text.count("\n") for page, text in pages().items() if page != REFERENCE}
    assert {page: count for page, count in lines.items() if count > 250} == {}


def test_each_option_has_a_help_text() -> None:
    for name, command in cli.commands.items():
        for parameter in command.params:
            if isinstance(parameter, click.Option):
                assert parameter.help, f"{name} {parameter.opts[0]}"


def invocations() -> Iterator[list[str]]:
    for found in blocks("sh"):
        for line in found.text.splitlines():
            if match := re.search(
                r"(?:python3? |uv run (?:--extra \w+ )?)(?:\S*/)?(?:sse_relay\.py|sse-relay)\b(.*)", line
            ):
                yield shlex.split(match[1].partition(" > ")[0])
    for text in pages().values():
        for match in re.finditer(r"`(?:sse_relay\.py|sse-relay) ([^`]+)`", text):
            yield shlex.split(match[1])


def test_each_call_of_the_relay_is_understood() -> None:
    calls = list(invocations())
    assert len(calls) >= 4, calls
    for arguments in calls:
        name, *rest = arguments if arguments[0] in cli.commands else ["run", *arguments]
        parse_command(name, rest)


@pytest.mark.parametrize(("program", "command"), [("simulation", simulation), ("benchmark", benchmark)])
def test_each_call_of_the_tests_own_programs_is_understood(program: str, command: click.Command) -> None:
    lines = "\n".join(found.text for found in blocks("sh"))
    calls = re.findall(rf"^\S*python tests/{program} (.*?)(?: *#.*)?$", lines, re.MULTILINE)
    assert calls
    for arguments in calls:
        command.make_context(program, arguments.split())


def test_each_option_named_in_the_docs_exists() -> None:
    known = {option for command in cli.commands.values() for one in command.params for option in one.opts}
    current = pages().keys() - {"CHANGELOG.md"}
    named = {name for page in current for name in re.findall(r"`(--[a-z-]+)", prose(page))}
    assert named - known - {"--help"} == set()


def test_the_set_up_commands_are_those_of_ci() -> None:
    demo, tests = blocks("sh", "README.md")[0].text.splitlines()
    assert tests in (ROOT / ".ci" / "run").read_text().splitlines()
    assert demo == tests.replace("[test]", "[demo]").replace(
        ".venv/bin/pytest", ".venv/bin/python sse_relay.py demo"
    )


def test_each_extra_named_in_the_docs_exists() -> None:
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    named = set(re.findall(r"--extra (\w+)|\.\[(\w+)\]", "".join(pages().values())))
    assert named
    assert {one or other for one, other in named} <= extras.keys()


def test_the_script_block_agrees_with_pyproject() -> None:
    block = re.search(
        r"^# /// script\n((?:#.*\n)*?)# ///$", (ROOT / "sse_relay.py").read_text(), re.MULTILINE
    )
    assert block
    script = tomllib.loads(re.sub(r"^# ?", "", block[1], flags=re.MULTILINE))
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert script == {name: project[name] for name in ("requires-python", "dependencies")}


@pytest.mark.parametrize("page", pages())
def test_links_lead_somewhere(page: str) -> None:
    for text, target in re.findall(r"\[([^]\n]+)\]\(([^)\s]+)\)", prose(page)):
        if target.startswith("https://"):
            continue
        path, _, anchor = target.partition("#")
        file = (ROOT / page).parent / path if path else ROOT / page
        assert file.exists(), (text, target)
        if anchor:
            assert anchor in anchors(str(file.resolve().relative_to(ROOT))), (text, target)


def test_each_test_that_is_named_exists() -> None:
    texts = {path.stem: path.read_text() for path in (ROOT / "tests").glob("test_*.py")}
    for page in pages():
        for name in re.findall(r"`(test_\w+)(?:\.py)?`", prose(page)):
            assert name in texts or any(f"def {name}(" in text for text in texts.values()), (page, name)


def test_each_block_that_a_test_names_is_there_once() -> None:
    """A quick look, since most of these tests are slow."""
    for path in (ROOT / "tests").glob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Call) and ast.unparse(node.func) in ("block", "pages.block"):
                with contextlib.suppress(ValueError):  # a name that only the run decides
                    block(*map(ast.literal_eval, node.args))


def test_words_are_those_of_the_style() -> None:
    """Docstrings say what is returned; nothing is written in words that readers stumbled over."""
    places = [PROGRAM, ROOT / ".ci" / "run", *(ROOT / "systemd").iterdir(), *(ROOT / "tests").rglob("*.py")]
    texts = {str(path): path.read_text() for path in places if path != Path(__file__)} | pages()
    stumbles = re.compile(
        r'"""(?:Gives?|Says?|Tells? whether)\b.*|\bmend(?:s|ed|ing)?\b|\bamid\b|\bfor ever\b'
        r"|\bin the midst\b|\bneeds not\b|\b[A-Z]+_MOST\b"
    )
    assert {path: found for path, text in texts.items() if (found := stumbles.findall(text))} == {}


def check(program: str, *arguments: str | Path, source: str = "") -> None:
    command = [require(program), *arguments]
    done = subprocess.run(command, input=source, capture_output=True, text=True, check=False, timeout=60)
    assert done.returncode == 0, done.stdout + done.stderr + source


def check_ini(text: str, folder: Path) -> None:
    """Let systemd read sections as additions to a unit; other lines are options in the environment."""
    sections = re.search(r"^\[", text, re.MULTILINE)
    if sections:
        unit = folder / "relay.service"
        unit.write_text("[Service]\nExecStart=/bin/true\n")
        addition = folder / "relay.service.d" / "docs.conf"
        addition.parent.mkdir(exist_ok=True)
        addition.write_text(text)
        check("systemd-analyze", "verify", "--man=no", "--recursive-errors=yes", unit)
    named = re.findall(r"^(?:Environment=)?\"?(SSE_RELAY_\w+)=", text, re.MULTILINE)
    assert named or sections, text
    assert set(named) <= {f"SSE_RELAY_{param.name}".upper() for param in cli.commands["run"].params}


def check_script(text: str, file: Path) -> None:
    file.write_text(text)
    check("node", "--check", file)


def check_html(text: str, folder: Path) -> None:
    for attributes, script in re.findall(r"<script([^>]*)>(.*?)</script>", text, re.DOTALL):
        check_script(script, folder / ("page.mjs" if "module" in attributes else "page.cjs"))


READ_YAML = ("ruby", "-ryaml", "-e", "YAML.safe_load($stdin.read, aliases: true)")
CHECKS: dict[str, Callable[[str, Path], object]] = {
    "html": check_html,
    "ini": check_ini,
    "js": lambda text, folder: check_script(text, folder / "block.mjs"),
    "json": lambda text, _: json.loads(text),
    "php": lambda text, _: check("php", "-l", source=text),
    "python": lambda text, _: ast.parse(text),
    "ruby": lambda text, _: check("ruby", "-wc", source=text),
    "sh": lambda text, _: check("bash", "-n", source=text),
    "yaml": lambda text, _: check(*READ_YAML, source=text),
}
# SQL is run below, output is compared with the program's, the image is built in test_container.py, what
# proxies read is read by them in test_proxies.py, and TypeScript in test_module.py.
UNCHECKED = {"text", "sql", "dockerfile", "nginx", "caddy", "haproxy", "apache", "http", "ts"}


@pytest.mark.slow
@pytest.mark.parametrize("language", CHECKS)
def test_code_is_read_by_its_own_tool(language: str, tmp_path: Path) -> None:
    for found in blocks(language):
        CHECKS[language](found.text, tmp_path)


def test_no_language_goes_unchecked() -> None:
    languages = {match[1] for text in pages().values() for match in FENCE.finditer(text)}
    assert languages <= CHECKS.keys() | UNCHECKED


def test_sql_runs_as_printed(own_server: Server) -> None:
    database = own_server.database
    database.execute("CREATE ROLE app; CREATE ROLE migrations; CREATE ROLE relay; CREATE ROLE ops")
    database.execute("CREATE TABLE shop_order (id bigint PRIMARY KEY, tenant_id int, state text)")
    apply_schema(own_server.dsn)
    for found in blocks("sql"):
        if "CREATE ROLE" not in found.text:  # those are run in test_roles.py
            database.execute(found.text)


def test_each_metric_is_explained(database: Database, start_relay: Callable[..., Relay]) -> None:
    relay = start_relay(dsn=database.dsn, admin=True)
    metrics = httpx.get(f"http://{relay.admin}/metrics").text
    given = set(re.findall(r"^# TYPE (sse_relay_\w+) (\w+)", metrics, re.MULTILINE))
    explained = r"^\| `(sse_relay_\w+)` \| (\w+) \|"
    assert given == set(re.findall(explained, pages()[REFERENCE], re.MULTILINE))


@pytest.mark.parametrize(
    ("heading", "cells"),
    [
        ("Control events", [f"`{reason}`" for reason in sse_relay.GAP_REASONS]),
        ("Control events", ["`relay.gap`", "`relay.refused`", "`relay.heartbeat`"]),
        ("Refusals", [str(status) for status in sse_relay.REFUSAL_STATUSES]),
    ],
)
def test_each_word_of_the_wire_has_its_row(heading: str, cells: list[str]) -> None:
    section = pages()[REFERENCE].partition(f"\n## {heading}\n")[2].partition("\n## ")[0]
    first = re.findall(r"^\| (\S+) \|", section, re.MULTILINE)
    assert set(cells) <= set(first)


def test_each_check_of_the_doctor_has_its_row(log_database: Database) -> None:
    done = CliRunner().invoke(cli, ["doctor", "--json", "--dsn", log_database.dsn])
    named = {finding["check"] for finding in json.loads(done.stdout)["findings"]}
    named |= {check for check, *_ in sse_relay.STREAM_TABLE}
    section = pages()[REFERENCE].partition("\n### Doctor's checks\n")[2].partition("\n### ")[0]
    assert named <= set(re.findall(r"`([\w ]+)`", section))


def in_words(value: float) -> str:
    for unit, size in (("MiB", MIB), ("KiB", KIB)):
        if value >= size and value % size == 0:
            return f"{value // size} {unit}"
    return f"{value:,}"


def test_each_limit_is_in_the_reference() -> None:
    # What bounds the relay's own work, not what somebody may do.
    internal = {"MAX_BACKOFF", "MAX_CUT_FACTOR", "MAX_LOG_ADVANCE", "MAX_SHARED", "MAX_WOKEN"}
    named = {name: value for name, value in vars(sse_relay).items() if name.startswith("MAX_")}
    named["MAX_LIFETIME"] //= 366 * 86_400
    table = pages()[REFERENCE].partition("\n## Limits\n")[2].replace("ten years", "10 years")
    missing = {
        name: in_words(value)
        for name, value in named.items()
        if not re.search(rf"(?<![\d,]){re.escape(in_words(value))}(?!\d|,\d)", table)
    }
    assert missing.keys() <= internal, missing


def test_the_token_of_the_docs_opens_what_it_says(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("jwt").write_bytes(b"k" * 32 + b"\n")
    names: dict[str, str] = {}
    exec(block("python", "# With the file of --jwt-key-file"), names)  # noqa: S102  # the docs' own lines
    grant = verify_token(names["token"], [read_key(b"k" * 32)], time.time())
    assert grant.channels.fullmatch("tenant-7-orders")
    assert not grant.channels.fullmatch("tenant-8-orders")


if __name__ == "__main__":
    if sys.argv[1:] != ["--write"]:
        sys.exit(f"usage: {sys.argv[0]} --write")
    (ROOT / REFERENCE).write_text(with_current_text(pages()[REFERENCE]))
