"""Sources of many images: their ids, in order, where the bytes are, and what is refused."""

from __future__ import annotations

import os
import tarfile
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from tokenmerge.batch import places
from tokenmerge.batch.columns import rows_of
from tokenmerge.batch.inputs import check_unique, open_inputs
from tokenmerge.batch.places import Place
from tokenmerge.errors import DataError, UnknownNameError

pa = pytest.importorskip("pyarrow")
pq = pytest.importorskip("pyarrow.parquet")


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    root = tmp_path / "photos"
    for i, name in enumerate(("b/2.png", "a/x/1.jpg", "0.bmp", "b/10.png")):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (8, 8), (i, i, i)).save(root / name)
    (root / "b/notes.txt").write_text("no image")
    (root / "b/.hidden.png").write_text("no image")
    return root


def read(source: Any, **options: Any) -> dict[str, bytes]:
    inputs = open_inputs(source, **options)
    assert [*inputs.ids()] == [inputs[i][0] for i in range(len(inputs))]
    return {inputs[i][0]: inputs[i][2].read() for i in range(len(inputs))}


def test_a_folder_and_its_url_are_alike(photos: Path) -> None:
    pytest.importorskip("fsspec")
    names = ["0.bmp", "a/x/1.jpg", "b/10.png", "b/2.png"]
    expected = {name: (photos / name).read_bytes() for name in names}
    assert read(photos) == read(f"files:{photos}/") == expected
    assert read(f"file://{photos}") == expected and open_inputs(photos)[1][1] == f"{photos}/a/x/1.jpg"


def test_names_that_are_no_text_are_escaped_and_read(photos: Path) -> None:
    try:
        os.rename(photos / "0.bmp", os.fsencode(photos) + b"/caf\xe9.bmp")  # noqa: PTH104 - a path of bytes
    except OSError:
        pytest.skip("this file system takes no such name")
    assert "caf\\xe9.bmp" in read(photos)


def test_a_list_of_paths_is_relative_to_itself(photos: Path) -> None:
    (photos / "list.txt").write_text(f"b/2.png\n\n  {photos}/0.bmp\nfile://{photos}/b/10.png\r\n")
    assert [*read(photos / "list.txt")] == ["b/2.png", f"{photos}/0.bmp", f"file://{photos}/b/10.png"]
    odd = photos / "b/\u2028 \x85.png"
    odd.write_bytes((photos / "0.bmp").read_bytes())
    (photos / "marked.txt").write_text(f"\ufeffb/2.png\n{odd}\n", encoding="utf-8")
    assert [*read(photos / "marked.txt")] == ["b/2.png", str(odd)]
    assert open_inputs(photos / "marked.txt").is_there()
    (photos / "names").write_text("b/2.png\n")
    assert read(f"list:{photos}/names") == {"b/2.png": (photos / "b/2.png").read_bytes()}


def _shard(path: Path, photos: Path, names: list[str]) -> None:
    with tarfile.open(path, "w") as tar:
        tar.add(photos / "b/.hidden.png", "b/.hidden.png")
        for name in names:
            tar.add(photos / name, name)
            tar.add(photos / "b/notes.txt", f"{name}.txt")


def test_shards(photos: Path, tmp_path: Path) -> None:
    _shard(tmp_path / "s-00.tar", photos, ["b/2.png", "0.bmp"])
    _shard(tmp_path / "s-01.tar", photos, ["b/2.png"])
    expected = {
        f"{shard}.tar/{name}": (photos / name).read_bytes()
        for shard, name in (("s-00", "b/2.png"), ("s-00", "0.bmp"), ("s-01", "b/2.png"))
    }
    assert read(f"{tmp_path}/s-{{00..01}}.tar") == read(f"wds:{tmp_path}/s-*.tar") == expected
    assert read(f"wds:{tmp_path}") == expected
    pytest.importorskip("fsspec")
    assert read(f"file://{tmp_path}/s-*.tar") == expected
    with pytest.raises(DataError, match=r"1 of the files of .* are not there: .*s-02.tar"):
        open_inputs(f"{tmp_path}/s-{{00..02}}.tar")


@pytest.mark.parametrize("broken", ["header", "cut in an image", "cut in a header", "no archive"])
def test_a_shard_that_breaks_off_keeps_what_stands_before(photos: Path, tmp_path: Path, broken: str) -> None:
    path = tmp_path / "s.tar"
    _shard(path, photos, ["b/2.png", "0.bmp", "b/10.png"])
    with tarfile.open(path) as tar:
        third = tar.getmember("b/10.png")
    content = bytearray(path.read_bytes())
    if broken == "header":
        content[third.offset + 10] ^= 1
    elif broken == "no archive":
        content = bytearray(b"no archive" * 100)
    else:
        del content[third.offset_data + 20 if broken == "cut in an image" else third.offset + 100 :]
    path.write_bytes(content)
    inputs = open_inputs(path)
    found: dict[str, str] = {}
    for i in range(len(inputs)):
        name, _, place = inputs[i]
        try:
            place.read()
            found[name] = ""
        except OSError as error:
            found[name] = str(error)
    after = "its start" if broken == "no archive" else "b/10.png" if broken == "cut in an image" else "0.bmp.txt"
    assert f"the shard cannot be read after {after}: " in found.pop("s.tar")
    if broken == "cut in an image":
        assert "it ends after 20 of the" in found.pop("s.tar/b/10.png")
    assert found == ({} if broken == "no archive" else {"s.tar/b/2.png": "", "s.tar/0.bmp": ""})


def test_columns_of_parquet(photos: Path, tmp_path: Path) -> None:
    names = ["b/2.png", "0.bmp", "b/10.png"]
    images = [(photos / name).read_bytes() for name in names]
    cells = [{"bytes": images[0], "path": None}, {"bytes": None, "path": str(photos / "0.bmp")}, None]
    table = pa.table({"name": names, "png": images, "cell": cells, "file": [*names[:2], None], "n": [1, 2, 3]})
    path = photos / "t.parquet"
    pq.write_table(table, path, row_group_size=2)
    assert read(path, image="png") == {f"t.parquet#{i}": image for i, image in enumerate(images)}
    assert read(path, image="png", ids="name") == dict(zip(names, images, strict=True))
    for column, reason in (
        ("cell", "there is no image in row 0 of row group 1"),
        ("file", "there is no path in this row"),
    ):
        inputs = open_inputs(path, image=column, ids="n")
        assert [inputs[i][2].read() for i in range(2)] == images[:2]
        with pytest.raises(OSError, match=reason):
            inputs[2][2].read()
    pq.write_table(table.select(["n", "png"]), tmp_path / "one.parquet")
    assert [*read(tmp_path / "one.parquet").values()] == images  # the only column of bytes
    with pytest.raises(DataError, match=r"which column of .* are the images\? It has name \(string\), png \(binary\)"):
        open_inputs(path)
    with pytest.raises(DataError, match=r"which column of .* are the images\?"):
        open_inputs(path, image="n")
    with pytest.raises(UnknownNameError, match=r"no column of .*t.parquet 'pngs'. Did you mean 'png'\?"):
        open_inputs(path, image="pngs")
    with pytest.raises(UnknownNameError, match=r"no column of .*t.parquet 'nam'. Did you mean 'name'\?"):
        open_inputs(path, image="png", ids="nam")
    (tmp_path / "text.parquet").write_text("no parquet")
    with pytest.raises(DataError, match=r"cannot read .*text.parquet"):
        open_inputs(tmp_path / "text.parquet")


def test_columns_as_other_tools_write_them(photos: Path, tmp_path: Path) -> None:
    names = ["b/2.png", "0.bmp", "b/10.png"]
    images = [(photos / name).read_bytes() for name in names]
    path = photos / "t.parquet"
    # pandas' categories, ids that are the paths, and ids as bytes
    pq.write_table(pa.table({"file": pa.array(names).dictionary_encode(), "raw": [b"a", b"\xff", b"c"]}), path)
    for column in ("file", None):
        if column is None:
            pq.write_table(pa.table({"file": pa.array(names).dictionary_encode()}), path)
        assert read(path, image=column, ids="file") == dict(zip(names, images, strict=True))
    cells = pa.array(images).dictionary_encode()
    pq.write_table(pa.table({"png": cells, "raw": pa.array([b"a", b"\xff", b"c"])}), path)
    assert read(path, image="png", ids="raw") == dict(zip(["a", "\\xff", "c"], images, strict=True))
    pq.write_table(pa.table({"png": images, "id": ["a", None, "c"]}), path, row_group_size=1)
    with pytest.raises(DataError, match=r"^row 1 of .*t.parquet has no id in its column id: give another --id-column"):
        open_inputs(path, ids="id")


def test_tables_on_a_disk_are_files_of_arrow(photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Python's own abort a process now and then that ends soon after: a thread of Arrow outlives the interpreter."""
    images = {f"t\\xff.parquet#{i}": (photos / name).read_bytes() for i, name in enumerate(("b/2.png", "0.bmp"))}
    pq.write_table(pa.table({"image": [*images.values()]}), tmp_path / "t.parquet")
    (tmp_path / "t.parquet").rename(tmp_path / os.fsdecode(b"t\xff.parquet"))
    monkeypatch.setattr(places, "open_binary", lambda path: pytest.fail("a file of Python's"))
    assert read(f"parquet:{tmp_path}/*.parquet") == images
    with pytest.raises(DataError, match=r"cannot read .*none.arrow: .*No such file"):
        [*rows_of(str(tmp_path / "none.arrow"), "x", None, None)]


@pytest.mark.skipif(not hasattr(pa, "string_view"), reason="this pyarrow has no views")
def test_columns_of_views_in_a_stream(photos: Path) -> None:
    names = ["b/2.png", "0.bmp"]
    table = pa.table({"file": pa.array(names, pa.string_view()), "id": ["a", "b"]})
    with pa.OSFile(str(photos / "t.arrow"), "wb") as file, pa.ipc.new_stream(file, table.schema) as stream:
        stream.write_table(table)
    (photos / "state.json").write_text('{"_data_files": [{"filename": "t.arrow"}]}')
    assert [*read(photos, ids="id")] == ["a", "b"]


def test_a_folder_that_datasets_saved(photos: Path, tmp_path: Path) -> None:
    datasets = pytest.importorskip("datasets")
    names = ["b/2.png", "0.bmp", "b/10.png", "a/x/1.jpg"]
    images = [(photos / name).read_bytes() for name in names]
    whole = datasets.Dataset.from_dict({"name": names, "image": [str(photos / name) for name in names]})
    whole = whole.cast_column("image", datasets.Image())
    whole.save_to_disk(tmp_path / "paths")  # it embeds the files
    whole.save_to_disk(tmp_path / "two", num_shards=2)
    both = datasets.DatasetDict({"train": whole.select([2, 0]), "test": whole.select([3])})
    both.save_to_disk(tmp_path / "both")
    file = "data-00000-of-00001.arrow"
    assert read(tmp_path / "paths") == {f"{file}#{i}": image for i, image in enumerate(images)}
    assert read(tmp_path / "two", ids="name") == dict(zip(names, images, strict=True))
    expected = {f"train/{file}#0": images[2], f"train/{file}#1": images[0], f"test/{file}#0": images[3]}
    assert read(f"hf:{tmp_path}/both/") == read(tmp_path / "both", image="image") == expected
    pytest.importorskip("fsspec")
    assert read(f"hf:file://{tmp_path}/both") == expected
    inputs = open_inputs(tmp_path / "both")
    assert inputs.is_there() and open_inputs(tmp_path / "both", ids="name").name == f"{tmp_path}/both, ids name"
    (tmp_path / "both/test" / file).write_bytes(b"no table")
    assert inputs.is_there()
    with pytest.raises(DataError, match=r"cannot read .*both/test/data-00000"):
        open_inputs(tmp_path / "both")
    (tmp_path / "both/test" / file).unlink()
    assert not inputs.is_there()
    (tmp_path / "both/train/state.json").write_text("{}")
    with pytest.raises(DataError, match=r"cannot read .*both as a folder of datasets"):
        open_inputs(tmp_path / "both")
    with pytest.raises(DataError, match=r"cannot read .*photos as a folder of datasets: No such file"):
        open_inputs(f"hf:{photos}")


def test_ids_that_are_there_twice(photos: Path) -> None:
    (photos / "list.txt").write_text("b/2.png\n0.bmp\nb/2.png\nb/2.png\nb/2.png#2\n")
    inputs = open_inputs(photos / "list.txt")
    with pytest.raises(DataError, match=r"1 ids are there more than once: b/2.png. .* or --duplicates suffix"):
        check_unique(inputs)
    found = check_unique(inputs, "suffix")
    assert [*found.ids()] == ["b/2.png", "0.bmp", "b/2.png#3", "b/2.png#4", "b/2.png#2"] and len(found) == 5
    assert found[2][1:] == inputs[2][1:] and found.name == inputs.name and found.is_there()
    with pytest.raises(UnknownNameError, match="no way with repeated ids 'keep'"):
        check_unique(inputs, "keep")
    assert check_unique(open_inputs(photos)) is not None


def test_what_is_no_source(photos: Path, tmp_path: Path) -> None:
    (tmp_path / "empty.txt").touch()
    for source, text in {
        tmp_path / "empty.txt": "there is no image named in",
        tmp_path / "none.txt": "cannot read .*none.txt: No such file",
        tmp_path / "s.tar.gz": "is compressed: an image in it cannot be reached by itself",
        "": "the name of the source is empty",
        "files:/nowhere": "no folder /nowhere",
        f"file://{tmp_path}/nowhere": "there is no image below|cannot list file://",
    }.items():
        with pytest.raises(DataError, match=text):
            open_inputs(source)
    with pytest.raises(DataError, match=r"0.bmp is one file: give the URL of a folder, or a text file of URLs"):
        open_inputs(f"file://{photos}/0.bmp")
    with pytest.raises(UnknownNameError, match=r"no source of images 'wd'. Did you mean 'wds'\?"):
        open_inputs("wd:x.tar")
    with pytest.raises(DataError, match="has no columns: --image-column and --id-column go with"):
        open_inputs(photos, ids="id")


def test_a_source_knows_whether_it_is_there(photos: Path, tmp_path: Path) -> None:
    _shard(tmp_path / "s.tar", photos, ["0.bmp"])
    folder, shard = open_inputs(photos), open_inputs(tmp_path / "s.tar")
    assert folder.is_there() and shard.is_there()
    (tmp_path / "s.tar").unlink()
    photos.rename(tmp_path / "away")
    assert not folder.is_there() and not shard.is_there()
    with pytest.raises(OSError, match=r"nowhere.png: No such file or directory"):
        Place("nowhere.png").read()
