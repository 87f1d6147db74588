"""Settings: filled by name, checked where they are made, from TOML and from the command line."""

from dataclasses import dataclass

import pytest

from sbiplat.errors import SettingError
from sbiplat.settings import build, parse_assignments, read_toml, setting, split


@dataclass(frozen=True)
class Oven:
    degrees: float = setting(180.0, "heat", low=0.0, high=300.0)
    minutes: int = setting(30, "time", low=1)
    rack: str = setting("middle", "where", among=("top", "middle"))
    fan: bool = setting(False, "whether it blows")
    trays: tuple[int, ...] = setting((1,), "which", low=0, fewest=1)
    timer: int | None = setting(None, "when to ring", low=1)


@dataclass(frozen=True)
class Cake:
    eggs: int = setting(3, "how many", low=0)


def test_settings_are_filled_by_name():
    made = build(Oven, {"degrees": 200, "trays": [1, 2], "timer": 5, "fan": True})
    assert made == Oven(degrees=200.0, trays=(1, 2), timer=5, fan=True)
    assert isinstance(made.degrees, float)
    assert build(Oven, {"timer": None}) == Oven()


@pytest.mark.parametrize(("values", "why"), [
    ({"degres": 1}, "no setting is called 'degres'; did you mean degrees"), ({"zzz": 1}, "known: degrees, minutes"),
    ({"degrees": 301}, "degrees = 301: expected a number between 0 and 300"), ({"degrees": "hot"}, "expected a number"),
    ({"degrees": float("nan")}, "expected a number"), ({"degrees": True}, "expected a number"),
    ({"minutes": 0}, "expected a whole number of at least 1"), ({"minutes": 2.5}, "expected a whole number"),
    ({"rack": "floor"}, "expected text, one of top, middle"), ({"rack": 1}, "expected text"),
    ({"fan": "yes"}, "expected true or false"),
    ({"trays": [1.5]}, "expected a list of whole numbers"), ({"trays": 3}, "list"), ({"trays": [-1]}, "list"),
    ({"trays": []}, "a list of whole numbers, 1 or more of them, of at least 0"),
    ({"timer": 0}, "at least 1"),
])
def test_an_impossible_value_says_what_was_expected(values, why):
    with pytest.raises(SettingError, match=why) as told:
        build(Oven, values)
    assert "\n" not in str(told.value)


def test_names_are_shared_out_among_classes():
    assert split({"eggs": 2, "fan": True}, Oven, Cake) == [{"fan": True}, {"eggs": 2}]
    with pytest.raises(SettingError, match="no setting is called 'egs'; did you mean eggs"):
        split({"egs": 2}, Oven, Cake)


def test_words_of_the_command_line_are_toml_values_or_text():
    words = ["a=1", "b=2.5", "c=true", "d=[1, 2]", "e=nsf", "f = 'a b'", "g=x=y", "h="]
    assert parse_assignments(words) == {"a": 1, "b": 2.5, "c": True, "d": [1, 2], "e": "nsf", "f": "a b", "g": "x=y", "h": ""}


@pytest.mark.parametrize("word", ["a", "=1", " =1"])
def test_a_word_without_a_name_or_value_is_refused(word):
    with pytest.raises(SettingError, match="expected key=value"):
        parse_assignments([word])


@pytest.mark.parametrize(("content", "why"),
                         [(None, "no settings file"), (b"a = \n", "is not TOML: .*line 1"), (b"\xff", "cannot be read")])
def test_a_settings_file_that_cannot_be_read_is_one_line(content, why, tmp_path):
    if content is not None:
        (tmp_path / "a.toml").write_bytes(content)
    with pytest.raises(SettingError, match=why) as told:
        read_toml(tmp_path / "a.toml")
    assert "\n" not in str(told.value)


def test_a_settings_file_is_read(tmp_path):
    (tmp_path / "a.toml").write_text('[oven]\nrack = "top"\n')
    assert read_toml(tmp_path / "a.toml") == {"oven": {"rack": "top"}}
