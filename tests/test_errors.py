"""What every error carries, and how it learns where it happened."""

import pytest

from llmprune.errors import LlmpruneError, NumericsError, PatternError


@pytest.mark.parametrize("kind", [NumericsError, PatternError])
def test_an_error_learns_the_name_of_what_it_happened_to(kind: type[LlmpruneError]) -> None:
    named = kind("it is nan", expected="a number", fix="try again").at("layers.0.q_proj")
    assert type(named) is kind
    assert str(named) == "layers.0.q_proj: it is nan\nexpected: a number\nfix: try again"
    assert (named.what, named.expected, named.fix) == ("layers.0.q_proj: it is nan", "a number", "try again")
