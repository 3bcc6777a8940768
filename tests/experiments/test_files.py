"""Signals, edges, images and volumes in files: round trips, and what is refused; `sparseopt denoise` of a volume."""

import json
from functools import partial

import nibabel
import numpy as np
import pytest
import tifffile
from PIL import Image

from sparseopt.experiments.read.files import FileError, check_output
from sparseopt.experiments.read.graph_files import NodeTable, read_edges, read_signal, write_fit
from sparseopt.experiments.read.images import read_image, write_image
from sparseopt.experiments.read.volumes import Scan, check_format, read_known, read_scan, write_scan

AFFINE = np.array([[-2.0, 0, 0, 10], [0, 0.5, 0, -20], [0, 0, 3.0, 5], [0, 0, 0, 1]])
SPACING = (2.0, 0.5, 3.0)


def blocks(kind=np.uint16):
    clean = np.full((6, 12, 10), 400.0)
    clean[2:, 4:9, 3:8] = 900
    return clean, (clean + 20 * np.random.default_rng(7).standard_normal(clean.shape)).astype(kind)


def put(path, content):
    """A file of a text, of bytes, of the arrays of an archive or of a volume; None leaves it out."""
    if isinstance(content, str):
        path.write_text(content, encoding="utf-8")
    elif isinstance(content, bytes):
        path.write_bytes(content)
    elif isinstance(content, dict):
        np.savez(path, **content)
    elif content is not None:
        nibabel.save(nibabel.Nifti1Image(content, AFFINE), path)
    return path


IDS = ("Bern", "12", "Chur")
OF_BERN, SERIES = partial(read_edges, nodes=IDS), partial(read_signal, series=True)
COLOURED = np.zeros((3, 4, 5), np.dtype([("R", "u1"), ("G", "u1"), ("B", "u1")]))
VOLUME = Scan(np.zeros((6, 12, 10), np.uint16), True, SPACING)


def writing(shape, kind):
    return lambda path: write_image(path, np.zeros(shape, kind))


def checking(values, *rest):
    return lambda path: check_format(path, Scan(values, *rest))


# What is called, the name of the file, what is in it, and what is said.
REFUSED = [
    (read_image, "absent.png", None, "there is no file"),
    (read_image, "text.png", "hello", r"cannot read .*text.png as an image"),
    (writing((2, 2), np.uint16), "a.jpg", b"old", "16-bit pixels; name a .png"),
    (writing((2, 2, 4), np.uint8), "a.jpg", b"old", r"cannot write .*RGBA"),
    (writing((6, 7, 2), np.uint16), "opacity.tif", b"old", r"16-bit grey with opacity"),
    (OF_BERN, "e.csv", "from,to\nBern,Basel\n", "the node 'Basel' in its edge 0"),
    (OF_BERN, "e.csv", "Bern,Chur,far\n", "'far' in row 1, is no number"),
    (read_edges, "e.csv", "0,1\n1,2.5\n", r"nodes \[1.0, 2.5\] in row 1"),
    (read_edges, "e.csv", "0\n1\n", "has 1 columns; an edge is two node numbers"),
    (read_signal, "y.csv", "node,y\na,1\nb,2\na,3\n", "the node 'a' in 2 rows"),
    (read_signal, "y.csv", "node,y\na,1\nb,two\n", "'two' in the column 'y', row 2 below the heading"),
    (SERIES, "y.csv", "date,y\n2020-01-01,1\n1 May,2\n", "'1 May' in row 2 of the column 'date'"),
    (SERIES, "y.csv", "t,y\n2020-02-01,1\n2020-01-01,2\n", "the column 't': sort the rows by it"),
    (SERIES, "y.csv", "date\n2020-01-01\n", "has dates but no column of values"),
    (read_signal, "y.csv", "t;y\n0;1.5\n1;2.5\n", "separate columns by commas"),
    (read_signal, "y.csv", "NA\n2\n3\n", "NA.* in its first row"),
    (read_signal, "y.csv", ",rain\n0,1.5\n1,2.5\n2,3.5\n", "ids of the nodes stand in the first one"),
    (read_signal, "n.npz", {"a": np.zeros(2), "b": np.zeros(2)}, "it holds a, b, expected one of signal, y"),
    (read_signal, "short.csv", "a,b\n1,2\n3\n", "its rows have 1 or 2 cells"),
    (read_signal, "e.csv.gz", b"", r"must end in one of .csv, .parquet, .npz"),
    (lambda path: check_output(path, None, False), "taken.csv", "", "exists already"),
    (lambda path: check_output(path / "x.csv", None, False), "absent", None, "does not exist or cannot be written"),
    (lambda path: check_output(path, (".csv",), False), "x.txt", None, r"must end in one of .csv"),
    (checking(np.zeros((2, 2), np.uint8)), "a.foo", None, "unknown file extension"),
    (checking(np.zeros((4, 4, 2))), "a.tif", None, "cannot hold 2 channels"),
    (checking(VOLUME.values, True), "out.png", None, "cannot hold a volume; .* one of .npz, .tif, .tiff"),
    (checking(np.zeros((3, 4))), "out.png", None, "cannot hold a picture of float64"),
    (read_scan, "series.nii", np.zeros((3, 4, 5, 2), np.float32), r"\(3, 4, 5, 2\); give a volume of three axes"),
    (read_scan, "rgb.nii", COLOURED, "give a volume of one number a voxel"),
    (read_scan, "short.nii", b"not a header", "cannot read"),
    (read_scan, "flat.npz", {"volume": np.zeros((3, 4))}, r"its array volume has the shape \(3, 4\)"),
    (read_scan, "object.npz", {"volume": np.array([[[{}]]], object)}, "pickled"),
    (read_scan, "text.npz", "no archive", "it is not an NPZ archive"),
    (partial(read_known, scan=VOLUME), "known.npz", {"volume": np.ones((5, 12, 10), bool)}, r"\(5, 12, 10\), .*scan"),
]


@pytest.mark.parametrize(("call", "name", "content", "words"), REFUSED, ids=[f"{row[1]}, {row[3]}" for row in REFUSED])
def test_what_cannot_be_read_or_written_is_named_and_an_old_file_stays(tmp_path, call, name, content, words):
    path = put(tmp_path / name, content)
    before = path.read_bytes() if path.is_file() else None
    with pytest.raises(FileError, match=words):
        call(path)
    assert (path.read_bytes() if path.is_file() else None) == before


@pytest.mark.parametrize("kind", [np.uint8, np.uint16])
@pytest.mark.parametrize("channels", [(), (3,), (4,)])
@pytest.mark.parametrize("ending", [".png", ".tif"])
def test_images_keep_depth_and_channels(tmp_path, rng, kind, channels, ending):
    image = rng.integers(0, np.iinfo(kind).max, (7, 5, *channels), endpoint=True).astype(kind)
    write_image(tmp_path / f"image{ending}", image)
    back = read_image(tmp_path / f"image{ending}")
    assert back.dtype == kind
    np.testing.assert_array_equal(back, image)


def test_images_of_other_programs_have_their_axes_byte_order_and_colours(tmp_path, rng):
    colour, grey = rng.integers(0, 255, (6, 7, 3), dtype=np.uint8), rng.integers(0, 2**16, (6, 7), dtype=np.uint16)
    tifffile.imwrite(tmp_path / "planes.tif", np.moveaxis(colour, -1, 0), photometric="rgb", planarconfig="separate")
    tifffile.imwrite(tmp_path / "big.tif", grey.astype(">u2"), byteorder=">")
    np.testing.assert_array_equal(read_image(tmp_path / "planes.tif"), colour)
    np.testing.assert_array_equal(read_image(tmp_path / "big.tif"), grey)
    Image.fromarray(np.full((3, 4, 3), 200, np.uint8)).convert("P").save(tmp_path / "p.png")
    assert read_image(tmp_path / "p.png").shape == (3, 4, 3)


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


def test_a_signal_without_a_heading_has_row_numbers_and_one_with_a_node_column_ids(tmp_path):
    found = read_signal(put(tmp_path / "y.csv", "1,2\n3,4\n"))
    assert (found.names, found.nodes) == (("channel_0", "channel_1"), None)
    write_fit(tmp_path / "fit.csv", found, np.array([0, 1]))
    assert (tmp_path / "fit.csv").read_text() == "node,channel_0,channel_1,piece\n0,1.0,2.0,0\n1,3.0,4.0,1\n"
    found = read_signal(put(tmp_path / "named.csv", "node,rain\na,1.5\nb#,2.5\nc,3.5\n"))
    assert (found.nodes, found.names, found.values.tolist()) == (("a", "b#", "c"), ("rain",), [1.5, 2.5, 3.5])


# The mark that spreadsheets put before UTF-8 makes no heading, and a blank line of one column is a node.
TEXTS = [
    (("1\n\n3\n4\n\n", "y\n1\n\n3\n4\n", "\ufeff1\n\n3\n4\n"), [1, np.nan, 3, 4]),
    (("# made by x\n\n1\n2\n", "v\n\n1\n2\n", "\n1\n2\n", "1\n# a note\n\n2\n"), [1, 2]),
    (("Na,K\n1,2\n", "x,-\n1,2\n"), [[1, 2]]),
    (("u,v\n0,1\n2,\n", "0,1\n2,\n", "u,v\n0,1\n2,NA\n", "0,1\n2, null \n"), [[0, 1], [2, np.nan]]),
]


def test_no_row_of_an_ordinary_table_is_lost(tmp_path):
    for texts, values in TEXTS:
        for text in texts:
            np.testing.assert_array_equal(read_signal(put(tmp_path / "y.csv", text)).values, values)


def test_edges_name_nodes_by_number_or_by_the_ids_of_the_signal_and_may_carry_weights(tmp_path):
    for heading in ("", "from,to,weight\n"):
        edges, weights = OF_BERN(put(tmp_path / "e.csv", heading + "Chur,Bern,0.5\n12, Chur,2\n"))
        assert (edges.tolist(), weights.tolist()) == ([[2, 0], [1, 2]], [0.5, 2.0])
    edges, weights = read_edges(put(tmp_path / "e.csv", "0,1,0.5\n1,2,2\n"))
    assert (edges.tolist(), weights.tolist()) == ([[0, 1], [1, 2]], [0.5, 2.0])
    assert read_edges(put(tmp_path / "e.npz", {"edges": edges, "other": weights}))[1] is None
    assert read_edges(put(tmp_path / "e.csv", "\ufeff0,1\n\n1,2\n"))[0].tolist() == [[0, 1], [1, 2]]


def test_an_archive_has_the_name_that_was_given_and_an_output_is_replaced_when_asked(tmp_path):
    write_scan(tmp_path / "a.NPZ", np.zeros((4, 4, 2)), Scan(np.zeros((4, 4, 2))))
    write_fit(tmp_path / "b.NPZ", NodeTable(np.zeros(4), ("y",)), None)
    assert sorted(file.name for file in tmp_path.iterdir()) == ["a.NPZ", "b.NPZ"]
    assert check_output(tmp_path / "a.NPZ", None, True)


@pytest.mark.parametrize("kind", [np.uint8, np.uint16, np.int16, np.float32])
@pytest.mark.parametrize("ending", [".nii", ".nii.gz", ".tif", ".npz"])
def test_a_volume_comes_back_as_it_was_written(tmp_path, kind, ending):
    _, values = blocks(kind)
    given, path = read_scan(put(tmp_path / "given.nii", values)), tmp_path / f"volume{ending}"
    check_format(path, given)
    write_scan(path, values, given)
    found = read_scan(path)
    np.testing.assert_array_equal(found.values, values)
    assert (found.values.dtype, found.volume, found.shape) == (kind, True, values.shape)
    assert found.spacing == (None if ending == ".tif" else SPACING)
    if ending.startswith(".nii"):
        np.testing.assert_array_equal(nibabel.load(path).affine, AFFINE)


def test_volumes_of_other_programs_have_their_units_colours_and_pages(tmp_path, rng):
    image = nibabel.Nifti1Image(blocks(np.int16)[1], AFFINE)
    image.header.set_data_dtype(np.int16)
    image.header.set_slope_inter(0.25, 10)
    nibabel.save(image, tmp_path / "scaled.nii")
    found = read_scan(tmp_path / "scaled.nii").values
    np.testing.assert_allclose(found, nibabel.load(tmp_path / "scaled.nii").get_fdata())
    assert found.dtype.kind == "f"
    colours = rng.integers(0, 255, (4, 9, 8, 3), np.uint8)
    tifffile.imwrite(tmp_path / "colours.tif", colours, photometric="rgb")
    found = read_scan(tmp_path / "colours.tif")
    np.testing.assert_array_equal(found.values, colours)
    assert found.shape == (4, 9, 8)
    volume = rng.integers(0, 2**16, (4, 16, 16), dtype=np.uint16)
    tifffile.imwrite(tmp_path / "volume.tif", volume, volumetric=True, photometric="minisblack")
    found = read_scan(tmp_path / "volume.tif")
    assert found.volume
    np.testing.assert_array_equal(found.values, volume)
    picture = read_scan(put(tmp_path / "picture.npz", {"image": rng.standard_normal((5, 6)).astype(np.float32)}))
    assert not picture.volume
    write_scan(tmp_path / "picture.tif", picture.values, picture)
    np.testing.assert_array_equal(tifffile.imread(tmp_path / "picture.tif"), picture.values)


def test_a_mask_is_what_is_not_black_whatever_its_opacity(tmp_path, rng):
    known = rng.random(VOLUME.shape) > 0.3
    np.testing.assert_array_equal(read_known(put(tmp_path / "known.npz", {"volume": known}), VOLUME), known)
    mask = np.zeros((6, 7, 4), np.uint8)
    mask[..., 3], mask[:3, :, :3] = 255, 255
    write_image(tmp_path / "mask.png", mask)
    known = read_known(tmp_path / "mask.png", Scan(np.zeros((6, 7), np.uint8)))
    np.testing.assert_array_equal(known, mask[..., 0] > 0)


@pytest.mark.filterwarnings("error")
def test_dates_with_time_zones_are_moments(tmp_path):
    rows = "2020-01-01T23:00Z,1\n2020-01-02T02:00+02:00,2\n2020-01-02T06:00,3\n"
    found = SERIES(put(tmp_path / "y.csv", f"timestamp,y\n{rows}"))
    np.testing.assert_allclose(found.times * 24, [0, 1, 7], atol=1e-9)


def test_the_command_denoises_a_scan_with_holes(tmp_path, command, done):
    clean, noisy = blocks(np.float32)
    noisy[3, 6, 5] = np.nan
    source, output = put(tmp_path / "scan.nii", noisy), tmp_path / "calm.nii.gz"
    for options, said in (
        ((), "--missing"),
        # Several axes may have one distance.
        (("--missing", "--spacing", "1,1"), "each of its 3 axes"),
        (("--missing", "--spacing", "wide"), "numbers separated by commas"),
        (("--missing", "--isotropic", "--order", 1), "given order 1"),
    ):
        status, _, err = command("denoise", source, "--output", output, *options)
        assert (status, said in err, output.exists()) == (2, True, False)
    assert "chosen by SURE" in done("denoise", source, "--output", output, "--isotropic", "--missing")
    fitted = nibabel.load(output)
    np.testing.assert_array_equal(fitted.affine, AFFINE)
    assert np.abs(fitted.get_fdata() - clean).mean() < 10
    assert abs(fitted.get_fdata()[3, 6, 5] - 900) < 40
    summary = json.loads((tmp_path / "calm-summary.json").read_text())
    assert (summary["status"], summary["spacing"], summary["isotropic"]) == ("CONVERGED", list(SPACING), True)
    assert (tmp_path / "calm-before-after.png").is_file()
