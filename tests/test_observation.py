"""Observations: what is declared, what is read from files, and what is refused."""

import h5py
import numpy as np
import pytest

from sbiplat.errors import ObservationError, SimulatorError
from sbiplat.observation import ObservationSpec, read_observation

PLAIN = ObservationSpec.declare((3,))
TABLE = ObservationSpec.declare((4, 2), labels=("prey", "predators"))
NAMED = ObservationSpec.declare({"image": (2, 2), "count": ()}, dtype="float64")
X = np.array([1.0, 2.5, -3.0])


@pytest.mark.parametrize(("declared", "why"), [
    (dict(shape=(0,)), "positive integers"), (dict(shape=(2.5,)), "positive integers"), (dict(shape="3"), "positive integers"),
    (dict(shape=(True,)), "positive integers"), (dict(shape={}), "at least one array"), (dict(shape={"a/b": 1}), "cannot name"),
    (dict(shape=3, dtype="int8"), "dtype"), (dict(shape=3, transform="sqrt"), "x_transform 'sqrt'"),
    (dict(shape=3, transform={"y": "log"}), "which x does not have"), (dict(shape=3, unit=1), "x_unit must be text"),
    (dict(shape=2, labels="ab"), "list of names"), (dict(shape=2, labels=("a", "a")), "'a' twice"),
    (dict(shape=2, labels=(1, 2)), "got 1"),
    (dict(shape=2, labels=("a",)), "1 names for a last axis of length 2"),
    (dict(shape={"a": 2}, labels=("a", "b")), "length none"),
    (dict(shape=3, axis=("t", [0, 1])), "2 values for a first axis of length 3"),
    (dict(shape=(), axis=("t", [0])), "length none"),
    (dict(shape=2, axis=("t", [0, np.nan])), "finite"), (dict(shape=2, axis=[0.0, 1.0]), r"must be \(name, values\)"),
    (dict(shape=2, axis="ab"), r"must be \(name, values\)"),
])
def test_a_declaration_that_cannot_be_is_refused(declared, why):
    with pytest.raises(SimulatorError, match=why):
        ObservationSpec.declare(**declared)


@pytest.mark.parametrize("shape", [np.array([4, 2]), [4, 2], (np.int64(4), 2)])
def test_a_shape_may_be_any_sequence_of_integers(shape):
    assert ObservationSpec.declare(shape).shapes == {"x": (4, 2)}


def test_labels_may_come_from_a_generator():
    assert ObservationSpec.declare(3, labels=(f"bin {k}" for k in range(3))).labels == ("bin 0", "bin 1", "bin 2")


@pytest.mark.parametrize("spec", [
    PLAIN, TABLE, NAMED, ObservationSpec.declare(()), ObservationSpec.declare(3, axis=("", [1, 2, 3])),
    ObservationSpec.declare(3, "float64", "log", ["a", "b", "c"], ("t [s]", np.arange(3)), "m"),
    ObservationSpec.declare({"x": 3}, transform={"x": "asinh"}),
])
def test_json_brings_the_same_spec_back(spec):
    assert ObservationSpec.from_json(spec.to_json()) == spec


@pytest.mark.parametrize("garbage",
                         [{}, {"shapes": 3}, {**PLAIN.to_json(), "shapes": {"x": ["a"]}}, {**PLAIN.to_json(), "labels": None},
                                     {**PLAIN.to_json(), "axis": 3}, {**PLAIN.to_json(), "shapes": [1], "plain": True}])
def test_a_garbled_spec_is_refused(garbage):
    with pytest.raises(SimulatorError):
        ObservationSpec.from_json(garbage)


# ------------------------------------------------------------------------------------------------------------ files


def save(path, x):
    if path.suffix == ".npy":
        np.save(path, x)
    elif path.suffix == ".npz":
        np.savez(path, data=x)
    elif path.suffix == ".csv":
        np.savetxt(path, x, delimiter=",")
    else:
        with h5py.File(path, "w") as file:
            file["anything"] = x
    return path


@pytest.mark.parametrize("suffix", [".npy", ".npz", ".csv", ".h5", ".hdf5"])
class TestEveryFormat:
    def test_one_observation_is_read(self, suffix, tmp_path):
        fields, batched = PLAIN.batch(read_observation(save(tmp_path / f"x{suffix}", X), PLAIN))
        assert not batched
        assert fields["x"].dtype == np.float32
        np.testing.assert_array_equal(fields["x"], X[None])

    def test_a_batch_is_read(self, suffix, tmp_path):
        fields, batched = PLAIN.batch(read_observation(save(tmp_path / f"x{suffix}", np.stack([X, 2 * X])), PLAIN))
        assert batched
        np.testing.assert_array_equal(fields["x"], [X, 2 * X])

    def test_another_shape_is_refused_with_both_shapes(self, suffix, tmp_path):
        path = save(tmp_path / f"x{suffix}", np.zeros((2, 4)))
        with pytest.raises(ObservationError, match=r"x.* has shape \(2, 4\), declared is \(2, 3\)"):
            read_observation(path, PLAIN)

    def test_nan_is_refused_with_its_place(self, suffix, tmp_path):
        path = save(tmp_path / f"x{suffix}", np.array([1.0, np.nan, np.inf]))
        with pytest.raises(ObservationError, match=r"2 value\(s\) .* first at x\[0, 1\]|2 value\(s\) .* first at x\[1\]"):
            read_observation(path, PLAIN)

    def test_garbage_is_one_line(self, suffix, tmp_path):
        path = tmp_path / f"x{suffix}"
        for garbage in (b"", b"\x00\xff\x93NUMPY\x01garbage", b"PK\x03\x04" + bytes(40), b"\x89HDF\r\n\x1a\n" + bytes(99)):
            path.write_bytes(garbage)
            with pytest.raises(ObservationError, match="x" + suffix) as told:
                read_observation(path, PLAIN)
            assert "\n" not in str(told.value)


@pytest.mark.parametrize("suffix", [".npz", ".h5"])
def test_named_arrays_are_read_by_name_and_others_left_out(suffix, tmp_path):
    path, x = tmp_path / f"x{suffix}", {"image": np.ones((2, 2)), "count": np.array(3.0), "comment": np.zeros(9)}
    if suffix == ".npz":
        np.savez(path, **x)
    else:
        with h5py.File(path, "w") as file:
            for name, values in x.items():
                file[f"x/{name}"] = values
    fields, batched = NAMED.batch(read_observation(path, NAMED))
    assert not batched
    assert {k: v.shape for k, v in fields.items()} == {"image": (1, 2, 2), "count": (1,)}


def test_a_missing_array_is_named(tmp_path):
    np.savez(tmp_path / "x.npz", image=np.ones((2, 2)))
    with pytest.raises(ObservationError, match="no array count; it holds image"):
        read_observation(tmp_path / "x.npz", NAMED)


@pytest.mark.parametrize("suffix", [".npy", ".csv"])
def test_a_dict_x_does_not_fit_one_array(suffix, tmp_path):
    with pytest.raises(ObservationError, match=r"give an \.npz or \.h5"):
        read_observation(save(tmp_path / f"x{suffix}", X), NAMED)


def test_a_pickle_is_never_loaded(tmp_path):
    class Trap:
        def __reduce__(self):
            return (pytest.fail, ("the pickle was run",))

    for name in ("x.npy", "y.npz"):
        (np.save if name == "x.npy" else np.savez)(tmp_path / name, np.array([Trap()], object), allow_pickle=True)
        with pytest.raises(ObservationError, match=r"allow_pickle"):
            read_observation(tmp_path / name, PLAIN)


CSV = {
    "header, other order, extra column": ("year,predators,prey\n1900,1,2\n1901,3,4\n1902,5,6\n1903,7,8\n",
                                          [[2, 1], [4, 3], [6, 5], [8, 7]]),
    "no header": ("2,1\n4,3\n6,5\n8,7\n", [[2, 1], [4, 3], [6, 5], [8, 7]]),
    "comments, blanks, BOM": ("\ufeff# by hand\n\nprey,predators\n2, 1\n4,3\n\n6,5\n8,7\n", [[2, 1], [4, 3], [6, 5], [8, 7]]),
}


@pytest.mark.parametrize("case", CSV)
def test_csv_columns_are_found_by_label(case, tmp_path):
    (tmp_path / "x.csv").write_text(CSV[case][0], encoding="utf-8")
    np.testing.assert_array_equal(read_observation(tmp_path / "x.csv", TABLE), CSV[case][1])


@pytest.mark.parametrize(("text", "why"), [
    ("prey,wolves\n1,2\n", "no column predators"), ("1,2\n3\n", "different numbers of columns"),
    ("1,2\n3,x\n", "data row 2 holds 'x'"),
    ("prey,predators\n", "a header and no values"), ("", "no values"),
    ("prey,predators\n1,2,3\n4,5,6\n", "names 2 columns, its rows have 3"),
])
def test_a_csv_that_cannot_be_is_told_where(text, why, tmp_path):
    (tmp_path / "x.csv").write_text(text)
    with pytest.raises(ObservationError, match=why):
        read_observation(tmp_path / "x.csv", TABLE)


def test_a_single_number_is_an_observation(tmp_path):
    spec = ObservationSpec.declare(())
    (tmp_path / "x.csv").write_text("1.5\n")
    assert spec.batch(read_observation(tmp_path / "x.csv", spec))[0]["x"].tolist() == [1.5]
    (tmp_path / "x.csv").write_text("1.5\n2.5\n")
    assert spec.batch(read_observation(tmp_path / "x.csv", spec))[0]["x"].tolist() == [1.5, 2.5]


@pytest.mark.parametrize(("name", "why"),
                         [("nowhere.npy", "no observation file"), ("x.txt", "not .txt"), ("x", "without a suffix")])
def test_a_file_of_no_known_kind_is_refused(name, why, tmp_path):
    if name != "nowhere.npy":
        (tmp_path / name).write_text("1")
    with pytest.raises(ObservationError, match=why):
        read_observation(tmp_path / name, PLAIN)


def test_what_float32_cannot_hold_becomes_infinite_and_is_refused():
    with pytest.raises(ObservationError, match="infinite"):
        PLAIN.batch([1.0, 1e300, 0.0])


@pytest.mark.parametrize(("x", "why"), [
    (np.zeros((0, 3)), "empty"), (np.zeros(3, complex), "dtype complex"), (["a", "b", "c"], "dtype"),
    ([[1, 2], [3]], "not an array"),
    ({"x": X}, "declared is one array"), (np.zeros((1, 1, 3)), "leading axis"),
])
def test_what_is_no_observation_is_refused(x, why):
    with pytest.raises(ObservationError, match=why):
        PLAIN.batch(x)
