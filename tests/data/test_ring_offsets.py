"""Where epochs begin, as literal numbers: a run that is resumed by a later version must begin them there too."""

from __future__ import annotations

import numpy as np

from rnnlm.data.ring import Ring


def test_offsets_of_epochs_never_change() -> None:
    assert [Ring(60, 3, 6, rotate_seed=1).offset(epoch) for epoch in range(6)] == [0, 7, 42, 8, 53, 45]
    large = [Ring(10**12 + 39, 4, 8, rotate_seed=seed).offset(epoch) for seed in (0, 7) for epoch in (1, 2, 300)]
    assert large == [490647841033, 48295885311, 716910512258, 536285266536, 564480858287, 523545183170]


def test_positions_are_whole_numbers_of_64_bits() -> None:
    starts, lengths = Ring(60, 3, 6).place(3, 0, 3)
    assert (starts.dtype, lengths.dtype) == (np.int64, np.int64)
    assert (starts.tolist(), lengths.tolist()) == ([18, 38, 58], [2, 2, 2])
