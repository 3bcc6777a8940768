"""Files: round trips, and errors that name what cannot be read."""

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
import tifffile

from sparseopt.experiments.read.files import FileError, check_output
from sparseopt.experiments.read.graph_files import NodeTable, read_edges, read_signal, write_fit
from sparseopt.experiments.read.images import read_image, write_image
from sparseopt.experiments.read.tables import read_table
from sparseopt.experiments.read.volumes import Scan, check_format, write_scan


@pytest.mark.parametrize("kind", [np.uint8, np.uint16])
@pytest.mark.parametrize("channels", [(), (3,), (4,)])
@pytest.mark.parametrize("ending", [".png", ".tif"])
def test_images_keep_depth_and_channels(tmp_path, rng, kind, channels, ending):
    image = rng.integers(0, np.iinfo(kind).max, (7, 5, *channels), endpoint=True).astype(kind)
    write_image(tmp_path / f"image{ending}", image)
    back = read_image(tmp_path / f"image{ending}")
    assert back.dtype == kind
    np.testing.assert_array_equal(back, image)


def test_tiffs_of_other_programs_have_their_axes_and_byte_order(tmp_path, rng):
    colour, grey = rng.integers(0, 255, (6, 7, 3), dtype=np.uint8), rng.integers(0, 2**16, (6, 7), dtype=np.uint16)
    tifffile.imwrite(tmp_path / "planes.tif", np.moveaxis(colour, -1, 0), photometric="rgb", planarconfig="separate")
    tifffile.imwrite(tmp_path / "big.tif", grey.astype(">u2"), byteorder=">")
    np.testing.assert_array_equal(read_image(tmp_path / "planes.tif"), colour)
    np.testing.assert_array_equal(read_image(tmp_path / "big.tif"), grey)
    with pytest.raises(FileError, match=r"cannot hold 16-bit grey with opacity; name a \.png"):
        write_image(tmp_path / "opacity.tif", np.ones((6, 7, 2), np.uint16))


def test_a_palette_image_becomes_colour(tmp_path):
    from PIL import Image

    Image.fromarray(np.full((3, 4, 3), 200, np.uint8)).convert("P").save(tmp_path / "p.png")
    assert read_image(tmp_path / "p.png").shape == (3, 4, 3)


def test_what_is_no_image_is_named(tmp_path):
    with pytest.raises(FileError, match="there is no file"):
        read_image(tmp_path / "absent.png")
    (tmp_path / "text.png").write_text("hello")
    with pytest.raises(FileError, match=r"cannot read .*text.png as an image"):
        read_image(tmp_path / "text.png")
    write_image(tmp_path / "deep.png", np.zeros((8, 8, 3), np.uint16))
    whole = (tmp_path / "deep.png").read_bytes()
    (tmp_path / "cut.png").write_bytes(whole[:60])
    with pytest.raises(FileError, match=r"cannot read .*cut.png as an image"):
        read_image(tmp_path / "cut.png")
    with pytest.raises(FileError, match=r"cannot hold 16-bit pixels; name a .png or .tif"):
        write_image(tmp_path / "deep.jpg", np.zeros((2, 2), np.uint16))


@pytest.mark.parametrize("ending", [".csv", ".parquet", ".npz"])
@pytest.mark.parametrize("names", [("rain",), ("rain", "snow, in mm")])
def test_fits_read_back_exactly_with_their_ids(tmp_path, rng, ending, names):
    values = rng.standard_normal((9, len(names))).squeeze()
    ids = ("Bern", "a, b", 'the "old" one', "007", *"efghi")
    file, pieces = tmp_path / f"fit{ending}", np.repeat(np.arange(3), 3)
    write_fit(file, NodeTable(values, names, ids, "id"), pieces)
    found = read_signal(file)
    np.testing.assert_array_equal(found.values, values)
    if ending == ".npz":
        with np.load(file) as stored:
            assert tuple(stored["node"]) == ids
            np.testing.assert_array_equal(stored["piece"], pieces)
    else:
        assert (found.names, found.nodes, found.nodes_name) == (names, ids, "id")
    write_fit(file, NodeTable(values, names), None)
    assert read_signal(file).nodes == (None if ending == ".npz" else tuple("012345678"))


def test_a_signal_without_a_heading_has_row_numbers(tmp_path):
    (tmp_path / "y.csv").write_text("1,2\n3,4\n")
    found = read_signal(tmp_path / "y.csv")
    assert (found.names, found.nodes) == (("channel_0", "channel_1"), None)
    write_fit(tmp_path / "fit.csv", found, np.array([0, 1]))
    assert (tmp_path / "fit.csv").read_text() == "node,channel_0,channel_1,piece\n0,1.0,2.0,0\n1,3.0,4.0,1\n"
    np.savetxt(tmp_path / "notes.csv", found.values, delimiter=",", header="made by hand")
    np.testing.assert_array_equal(read_signal(tmp_path / "notes.csv").values, found.values)


def test_edges_name_nodes_by_the_ids_of_the_signal(tmp_path):
    ids = ("Bern", "12", "Chur")
    for heading in ("", "from,to,weight\n"):
        (tmp_path / "e.csv").write_text(heading + "Chur,Bern,0.5\n12, Chur,2\n")
        edges, weights = read_edges(tmp_path / "e.csv", ids)
        assert (edges.tolist(), weights.tolist()) == ([[2, 0], [1, 2]], [0.5, 2.0])
    (tmp_path / "e.csv").write_text("from,to\nBern,Basel\n")
    with pytest.raises(FileError, match="names the node 'Basel' in its edge 0, and the signal has no such id"):
        read_edges(tmp_path / "e.csv", ids)
    (tmp_path / "e.csv").write_text("Bern,Chur,far\n")
    with pytest.raises(FileError, match="cannot read the weights"):
        read_edges(tmp_path / "e.csv", ids)
    (tmp_path / "e.csv").write_text("Bern\nChur\n")
    with pytest.raises(FileError, match="has 1 columns; an edge is two ids"):
        read_edges(tmp_path / "e.csv", ids)


def test_ids_that_cannot_be_used_are_named(tmp_path):
    (tmp_path / "y.csv").write_text("node,y\na,1\nb,2\na,3\n")
    with pytest.raises(FileError, match="names the node 'a' in 2 rows; give a node one row"):
        read_signal(tmp_path / "y.csv")
    (tmp_path / "y.csv").write_text("node\na\nb\n")
    with pytest.raises(FileError, match="has the ids of the nodes but no column of values"):
        read_signal(tmp_path / "y.csv")
    (tmp_path / "y.csv").write_text("node,y\na,1\nb,two\n")
    with pytest.raises(FileError, match="cannot read numbers"):
        read_signal(tmp_path / "y.csv")


def test_the_index_of_pandas_is_no_channel(tmp_path):
    (tmp_path / "index.csv").write_text(",rain\n0,1.5\n1,2.5\n2,3.5\n")
    # As pandas writes a frame whose rows were chosen, and one whose index has a name.
    for file, index in (("filtered", "__index_level_0__"), ("named", "node")):
        table = pyarrow.table({"rain": [1.5, 2.5, 3.5], index: [0, 2, 1]})
        pyarrow.parquet.write_table(table, tmp_path / f"{file}.parquet")
    for file in ("index.csv", "filtered.parquet", "named.parquet"):
        with pytest.raises(FileError, match="the ids of the nodes stand in the first one"):
            read_signal(tmp_path / file)
    (tmp_path / "named.csv").write_text("node,rain\na,1.5\nb#,2.5\nc,3.5\n")
    found = read_signal(tmp_path / "named.csv")
    assert (found.nodes, found.names, found.values.tolist()) == (("a", "b#", "c"), ("rain",), [1.5, 2.5, 3.5])


def test_tables_with_and_without_heading_and_empty_cells(tmp_path):
    (tmp_path / "a.csv").write_text("u,v\n0,1\n2,\n")
    (tmp_path / "b.csv").write_text("0,1\n2,\n")
    for name in ("a", "b"):
        np.testing.assert_array_equal(read_table(tmp_path / f"{name}.csv"), [[0, 1], [2, np.nan]])


def test_no_row_of_an_ordinary_table_is_lost(tmp_path):
    """The mark that spreadsheets put before UTF-8 makes no heading, and a blank line of one column is a node."""
    for text in ("1\n\n3\n4\n\n", "y\n1\n\n3\n4\n", "\ufeff1\n\n3\n4\n"):
        (tmp_path / "y.csv").write_text(text, encoding="utf-8")
        np.testing.assert_array_equal(read_signal(tmp_path / "y.csv").values, [1, np.nan, 3, 4])
    for text in ("# made by x\n\n1\n2\n", "v\n\n1\n2\n", "\n1\n2\n", "1\n# a note\n\n2\n"):
        (tmp_path / "y.csv").write_text(text)
        np.testing.assert_array_equal(read_signal(tmp_path / "y.csv").values, [1, 2])
    for text in ("Na,K\n1,2\n", "x,-\n1,2\n"):
        (tmp_path / "y.csv").write_text(text)
        np.testing.assert_array_equal(read_signal(tmp_path / "y.csv").values, [[1, 2]])
    (tmp_path / "e.csv").write_text("\ufeff0,1\n\n1,2\n", encoding="utf-8")
    assert read_edges(tmp_path / "e.csv")[0].tolist() == [[0, 1], [1, 2]]
    (tmp_path / "y.csv").write_text("NA\n2\n3\n")
    with pytest.raises(FileError, match="in its first row; leave a cell empty where a value is missing"):
        read_signal(tmp_path / "y.csv")
    (tmp_path / "e.csv").write_text("10,20\n1,2\n")
    with pytest.raises(FileError, match="names the node '10' in its edge 0"):
        read_edges(tmp_path / "e.csv", ("1", "2"))


def test_an_archive_has_the_name_that_was_given(tmp_path, rng):
    values = rng.standard_normal((4, 4, 2))
    write_scan(tmp_path / "a.NPZ", values, Scan(values))
    write_fit(tmp_path / "b.NPZ", NodeTable(values[:, 0, 0], ("y",)), None)
    assert sorted(file.name for file in tmp_path.iterdir()) == ["a.NPZ", "b.NPZ"]
    with pytest.raises(FileError, match=r"cannot hold 2 channels of this kind; name a file that ends in \.npz"):
        check_format(tmp_path / "a.tif", Scan(values))


def test_an_image_that_a_format_cannot_hold_leaves_the_old_file(tmp_path):
    (tmp_path / "a.jpg").write_bytes(b"old")
    with pytest.raises(FileError, match=r"cannot write .*RGBA"):
        write_image(tmp_path / "a.jpg", np.zeros((2, 2, 4), np.uint8))
    assert (tmp_path / "a.jpg").read_bytes() == b"old"
    for name in ("a.foo", "a"):
        with pytest.raises(FileError, match="unknown file extension"):
            check_format(tmp_path / name, Scan(np.zeros((2, 2), np.uint8)))


def test_edges_may_carry_weights(tmp_path):
    (tmp_path / "e.csv").write_text("0,1,0.5\n1,2,2\n")
    edges, weights = read_edges(tmp_path / "e.csv")
    assert edges.tolist() == [[0, 1], [1, 2]]
    assert weights.tolist() == [0.5, 2.0]
    np.savez(tmp_path / "e.npz", edges=edges, other=weights)
    assert read_edges(tmp_path / "e.npz")[1] is None


def test_bad_tables_are_named(tmp_path):
    (tmp_path / "e.csv").write_text("0,1\n1,2.5\n")
    with pytest.raises(FileError, match=r"nodes \[1.0, 2.5\] in row 1; node numbers are whole"):
        read_edges(tmp_path / "e.csv")
    (tmp_path / "one.csv").write_text("0\n1\n")
    with pytest.raises(FileError, match="has 1 columns; an edge is two node numbers"):
        read_edges(tmp_path / "one.csv")
    (tmp_path / "words.csv").write_text("a,b\nc,d\n")
    with pytest.raises(FileError, match="cannot read numbers"):
        read_table(tmp_path / "words.csv")
    np.savez(tmp_path / "n.npz", a=np.zeros(2), b=np.zeros(2))
    with pytest.raises(FileError, match="it holds a, b, expected one of signal, y"):
        read_signal(tmp_path / "n.npz")
    np.savez(tmp_path / "o.npz", signal=np.array([{}], object))
    with pytest.raises(FileError, match="cannot read numbers"):
        read_signal(tmp_path / "o.npz")
    with pytest.raises(FileError, match=r"must end in one of .csv, .parquet, .npz"):
        read_table(tmp_path / "e.csv.gz") if (tmp_path / "e.csv.gz").write_bytes(b"") == 0 else None


def test_outputs_are_never_replaced_unasked(tmp_path):
    (tmp_path / "taken.csv").touch()
    with pytest.raises(FileError, match="exists already"):
        check_output(tmp_path / "taken.csv", None, False)
    assert check_output(tmp_path / "taken.csv", None, True)
    with pytest.raises(FileError, match="does not exist or cannot be written"):
        check_output(tmp_path / "absent" / "x.csv", None, False)
    with pytest.raises(FileError, match=r"must end in one of .csv"):
        check_output(tmp_path / "x.txt", (".csv",), False)
