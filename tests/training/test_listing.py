"""What braces in the name of a data set stand for."""

import pytest

from tests.training.pictures import shards_of
from training.data import DataError, open_source
from training.listing import expanded


@pytest.mark.parametrize(
    ("pattern", "names"),
    [
        ("a.tar", "a.tar"),
        ("{a}{}{1..}{a..b}.tar", "{a}{}{1..}{a..b}.tar"),
        ("{8..11}", "8 9 10 11"),
        ("{098..101}", "098 099 100 101"),
        ("{2..0}-{a,b}", "2-a 2-b 1-a 1-b 0-a 0-b"),
        ("x{a,{b,0{0..1}},}y{z}", "xay{z} xby{z} x00y{z} x01y{z} xy{z}"),
    ],
)
def test_braces(pattern, names):
    assert sorted(expanded(pattern)) == sorted(names.split())


def test_braces_without_end_are_refused():
    with pytest.raises(DataError, match="stands for more than 1,000,000 names"):
        expanded("{0..999999999999999}{0..9}")


def test_names_that_come_twice_hide_none_that_is_left_out():
    with pytest.raises(DataError, match="stands for more than 1,000,000 names"):
        expanded("{1..1100}{1..1100}")  # 1 and 11 is 11 and 1


def test_shards_in_braces(tmp_path):
    shards_of(tmp_path, (2, 1, 1))
    specs = {"{000,002}": 3, "{000..001}": 3, "{00[01],002}": 4, "{[01]*,00*}": 4, "{000..000}": 2}  # the last: of one
    for spec, found in specs.items():
        assert len(open_source(f"{tmp_path}/{spec}.tar")) == found
    with pytest.raises(DataError, match="there is no file .*003.tar"):
        open_source(f"{tmp_path}/{{000..004}}.tar")
    mixed = open_source(f"{tmp_path}/{{000,001}}.tar=0.5,{tmp_path}/002.tar=0.5")
    assert len(mixed) == 4 and mixed.layout.weights == (0.5, 0.5)
    many = f"{tmp_path}/{{{','.join(['000', '001'] * 50)}}}.tar"  # longer than a file's name can be
    assert len(open_source(many)) == 3 and len(open_source(f"{many}=0.5,{tmp_path}/002.tar=0.5")) == 4
    (tmp_path / "{a,b}").mkdir()
    shards_of(tmp_path / "{a,b}", (1,))
    assert len(open_source(f"{tmp_path}/{{a,b}}")) == 1  # a folder of that very name
    assert len(open_source(f"{tmp_path}/{{a,b}}/*.tar")) == 1  # and shards in it
