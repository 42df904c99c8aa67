"""How help is laid out: commands and options in groups, and every value by its own word rather than a Python type."""

import copy
from collections.abc import Callable
from typing import Annotated, Any

import typer
from rich.markup import escape
from typer.core import TyperCommand, TyperGroup

from llmprune.cli.options import EXIT_CODES

# The groups of commands, in the order of `llmprune --help`.
PRUNE, MEASURE, DEPLOY = PANELS = ("Prune", "Measure", "Deploy")

# The groups of a command's options; those without one come last.
WHAT, TEXT, OUTPUT, _OTHERS = "What to prune", "Text", "Output", "Other options"

Resume = Annotated[bool, typer.Option("--resume", rich_help_panel=OUTPUT, help="Continue the interrupted run in DIR.")]
Overwrite = Annotated[
    bool, typer.Option("--overwrite", rich_help_panel=OUTPUT, help="Replace the checkpoint in the output folder.")
]


def add(
    app: typer.Typer, function: Callable[..., None], panel: str, examples: str = "", name: str | None = None
) -> None:
    """Add a command to a group of `llmprune --help`, with its examples and the exit codes below its options."""
    epilog = f"{examples}\n{EXIT_CODES}" if examples else EXIT_CODES
    app.command(name, cls=_Command, rich_help_panel=panel, epilog=epilog)(function)
    app.registered_commands.sort(key=lambda command: PANELS.index(str(command.rich_help_panel)))


class _Plain:
    """Help in which a flag has no value, and options without a group follow those with one."""

    params: list[Any]
    help: str | None

    def __init__(self, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **options)
        # Paragraphs are wrapped to the terminal, not where the source wraps them.
        self.help = "\n\n".join(" ".join(part.split()) for part in (self.help or "").split("\n\n"))
        self._grouped = any(_is_option(param) and param.rich_help_panel for param in self.params)
        for param in self.params:
            if _is_option(param):
                self._plain(param)
            else:
                param.display_type_rich = _nothing  # beside its name, typer shows an argument's Python type

    def get_help_option(self, ctx: Any) -> Any:
        """The option that shows the help, as the others are shown."""
        option = super().get_help_option(ctx)  # type: ignore[misc] # of the command, which comes after this class
        if option is not None:
            option.metavar = ""
            self._plain(option)
        return option

    def format_help(self, ctx: Any, formatter: Any) -> None:
        """Print the help, in which "[wanda, swaps]" is no markup."""
        shown = copy.copy(self)
        shown.params = [copy.copy(param) for param in self.params]
        for param in shown.params:
            param.help = escape(param.help or "")
        super(_Plain, shown).format_help(ctx, formatter)  # type: ignore[misc] # as above

    def _plain(self, option: Any) -> None:
        if option.is_flag and option.metavar is None:
            option.metavar = ""
        if self._grouped and option.rich_help_panel is None:
            option.rich_help_panel = _OTHERS


class _Command(_Plain, TyperCommand):
    pass


class Group(_Plain, TyperGroup):
    """The commands themselves."""


def _nothing(ctx: Any) -> None:
    return None


def _is_option(param: Any) -> bool:
    return bool(param.param_type_name == "option")
