import pyarrow as pa

from mmref.storage.packed_strings import pack_strings, unpack_strings


def test_strings_survive_packing():
    for strings in ([], [""], ["a", "", "é – 鳥", "x" * 300]):
        assert unpack_strings(*pack_strings(strings)).to_pylist() == strings


def test_a_slice_is_packed_without_its_neighbors():
    some = pa.array(["before", "é", "", "鳥", "after"], pa.large_string())[1:4]
    data, ends = pack_strings(some)
    assert bytes(data).decode() == "é鳥" and ends.tolist() == [2, 2, 5]
