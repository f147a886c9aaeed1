from gradstat.util import one_of

NAMES = [f"transformer.h.{i}.mlp.c_proj.weight" for i in range(146)]


def test_one_of_names_those_like_it_and_only_some_of_many() -> None:
    said = one_of("transformer.h.77.mlp.c_proj.weigth", NAMES)
    assert "did you mean 'transformer.h.77.mlp.c_proj.weight'" in said
    assert " and 138 others " in said
    assert said.count("transformer") == 8 + 3


def test_one_of_is_silent_of_close_ones_where_there_are_none() -> None:
    assert one_of("x", ["left", "right"]) == "one of 'left', 'right'"
    assert one_of("x", []) == "one of none"
