import os
import pickle
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from spice_ray.errors import DataError
from tests.readers.cifar_files import cifar_rows, put_cifar100, put_python_cifar10, python2_pickle
from tests.readers.reading import opened


class Payload:
    """Would make a file when it is unpickled by an unpickler that calls what it is asked to."""

    def __init__(self, file: Path) -> None:
        self.file = file

    def __reduce__(self) -> tuple[Callable[..., object], tuple[str]]:
        return os.mkdir, (str(self.file),)


def test_a_pickle_that_calls_a_function_is_refused_and_does_not_run(tmp_path: Path) -> None:
    put_python_cifar10(tmp_path / "cifar")
    trap = tmp_path / "trap"
    malicious = python2_pickle({b"data": cifar_rows(0, 1), b"labels": [0], b"extra": Payload(trap)})
    pickle.loads(malicious, encoding="bytes")
    assert trap.is_dir()
    trap.rmdir()
    (tmp_path / "cifar" / "data_batch_3").write_bytes(malicious)
    with pytest.raises(DataError, match=r"data_batch_3 is a pickle that wants to use posix\.mkdir.*do not trust it"):
        opened(tmp_path / "cifar").chunks(10)
    assert not trap.exists()


@pytest.mark.parametrize(
    "program",
    [
        b"cos\nsystem\n(S'true'\ntR.",
        b"(S'true'\nios\nsystem\n.",
        b"c__builtin__\neval\n(S'1'\ntR.",
        b"cbuiltins\ngetattr\n.",
        b"cnumpy\nload\n.",
        b"cnumpy.core.multiarray\nscalar\n.",
        b"c_codecs\nencode\n.",
        b"\x80\x04\x8c\x05numpy\x8c\x0cndarray.view\x93.",
    ],
)
def test_every_name_but_those_of_an_array_ends_the_reading(tmp_path: Path, program: bytes) -> None:
    (put_python_cifar10(tmp_path) / "test_batch").write_bytes(program)
    with pytest.raises(DataError, match="test_batch is a pickle that wants to use"):
        opened(tmp_path).chunks(10)


def array_pickle(shape: object, dtype: bytes, data: object) -> bytes:
    """A batch whose array state says what we like."""

    class Array:
        def __reduce__(self) -> tuple[object, ...]:
            made = np.zeros(1, np.uint8).__reduce__()
            return (made[0], made[1], (1, shape, np.dtype(dtype.decode()), False, data))

    return python2_pickle({b"data": Array(), b"labels": [0]})


@pytest.mark.parametrize(
    "batch",
    [
        b"",
        b"\x80\x02",
        b"not a pickle at all",
        b"\x80\x02]q\x00.",
        b"\x80\x02X\xff\xff\xff\x7f.",
        b"cnumpy\nndarray\n(tR}b.",
        array_pickle((1, 3072), b"u1", b"short"),
        array_pickle((1 << 40, 3072), b"u1", b"short"),
        array_pickle((-1, -3072), b"u1", bytes(3072)),
        array_pickle((-1, 3072), b"u1", bytes(3072)),
        array_pickle((0, -3072), b"u1", b""),
        array_pickle((1, 3072), b"f4", bytes(4 * 3072)),
        array_pickle((1, 3072), b"i1", bytes(3072)),
        array_pickle((1, 3071), b"u1", bytes(3071)),
        array_pickle("shape", b"u1", bytes(3072)),
        array_pickle((), b"u1", bytes(1)),
        python2_pickle({b"data": 5, b"labels": [0]}),
        python2_pickle({b"data": cifar_rows(0, 2), b"labels": [0]}),
        python2_pickle({b"data": cifar_rows(0, 1), b"labels": [b"cat"]}),
        python2_pickle({b"data": cifar_rows(0, 1), b"labels": 3}),
        python2_pickle({b"data": cifar_rows(0, 1), b"labels": [10]}),
        python2_pickle({b"data": cifar_rows(0, 1), b"labels": [-1]}),
        python2_pickle({b"data": cifar_rows(0, 1)}),
        python2_pickle({b"labels": [0]}),
        python2_pickle({b"data": cifar_rows(0, 1), b"labels": [0]})[:-100],
    ],
)
def test_a_damaged_batch_is_refused_by_name(tmp_path: Path, batch: bytes) -> None:
    (put_python_cifar10(tmp_path) / "data_batch_2").write_bytes(batch)
    with pytest.raises(DataError, match=r"data_batch_2 .*(unpack the archive again)"):
        opened(tmp_path).chunks(10)


def test_a_batch_of_another_data_set_is_refused(tmp_path: Path) -> None:
    put_cifar100(tmp_path)
    put_python_cifar10(tmp_path / "ten")
    (tmp_path / "train").write_bytes((tmp_path / "ten" / "data_batch_1").read_bytes())
    with pytest.raises(DataError, match=r"train is not a CIFAR batch .* a list coarse_labels"):
        opened(tmp_path).chunks(10)
