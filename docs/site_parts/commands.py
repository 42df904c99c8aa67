"""Parts about the command line, generated from the commands' own help."""

from typing import Any

import typer

from llmprune.cli import app
from site_parts.markdown import code, literal, table


def commands() -> dict[str, Any]:
    """Every command by name, in the order of `llmprune --help`."""
    group: Any = typer.main.get_command(app)
    return dict(group.commands)


def command_table() -> str:
    """One line per command."""
    rows = ((f"[`llmprune {name}`](#{_anchor(name)})", _help(command)[0]) for name, command in commands().items())
    return table(("command", "what it does"), rows)


def command_reference() -> str:
    """Each command: usage, arguments, options, examples."""
    return "\n\n".join(_command(name, command) for name, command in commands().items())


def exit_codes() -> str:
    """The meaning of the exit codes, which all commands share."""
    from llmprune.cli.options import EXIT_CODES

    return EXIT_CODES.removeprefix("Exit codes: ")


def _command(name: str, command: Any) -> str:
    context = command.make_context(f"llmprune {name}", [], resilient_parsing=True)
    usage = " ".join([f"llmprune {name}", *command.collect_usage_pieces(context)])
    parts = [f"## llmprune {name}", *_help(command), code(usage)]
    for kind in ("argument", "option"):
        params = [param for param in command.params if param.param_type_name == kind and not param.hidden]
        if params:
            records = (param.get_help_record(context) for param in params)
            parts.append(table((kind, "meaning"), ((literal(names), meaning) for names, meaning in records)))
    if examples := _examples(command):
        parts.append(code("\n".join(examples), "bash"))
    return "\n\n".join(parts)


def _help(command: Any) -> list[str]:
    """The paragraphs of a command's help text."""
    return [" ".join(paragraph.split()) for paragraph in command.help.split("\n\n")]


def _examples(command: Any) -> list[str]:
    """The example commands at the end of the help."""
    lines = [line.strip() for line in (command.epilog or "").splitlines()]
    return [line for line in lines if line and not line.startswith(("Example", "Exit codes"))]


def _anchor(name: str) -> str:
    return f"llmprune-{name}"


PARTS = {"command-table": command_table, "command-reference": command_reference, "exit-codes": exit_codes}
