"""Tests of the exceptions that end a command, and of their wording."""

from fm_jax.errors import DivergedError, UserError, reason, unknown


def test_the_nearest_known_names_come_first_and_the_rest_by_alphabet():
    error = unknown("schedule.name", "lineer", ["wsd", "linear", "cosine", "liner"])
    assert str(error) == (
        "schedule.name must be one of the known names; got 'lineer'. "
        "Did you mean 'liner'? Known: liner, linear, cosine, wsd"
    )


def test_a_name_like_no_other_gets_no_suggestion():
    error = unknown("flag", "zzz", {"workdir": 1, "config": 2})
    assert str(error) == (
        "flag must be one of the known names; got 'zzz'. Known: config, workdir"
    )


def test_a_name_of_another_type_is_shown_as_it_is():
    error = unknown("optimizer.name", None, ("adamw",))
    assert str(error) == (
        "optimizer.name must be one of the known names; got None. Known: adamw"
    )


def test_an_unknown_name_is_the_users_mistake_and_a_value_error():
    error = unknown("flag", "a", ["b"])
    assert isinstance(error, UserError)
    assert isinstance(error, ValueError)


def test_divergence_is_not_the_users_mistake():
    assert not issubclass(DivergedError, ValueError)


def test_a_reason_is_one_line_and_says_something():
    assert reason(ValueError("\nfirst\nsecond")) == "first"
    assert reason(FileNotFoundError(2, "No such file", "a.txt")) == "No such file"
    assert reason(TimeoutError()) == "TimeoutError"
