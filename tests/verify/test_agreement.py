"""Agreement with the native model, against closed forms."""

import numpy as np
import pytest

from rdeploy.errors import InvariantError
from rdeploy.metrics import segmentation
from rdeploy.metrics.intervals import mean_interval
from rdeploy.metrics.outputs import Outputs
from rdeploy.verify import agreement


def of(*arrays):
    """Outputs with the pixel decisions that a run keeps of dense ones."""
    dense = segmentation.classes_of(arrays[0]) if arrays[0].ndim == 4 else None
    return Outputs(arrays=arrays, decisions=dense)


def test_agreement_needs_no_labels():
    found = agreement.agree(of(np.eye(4)[[0, 1, 2, 0]]), of(np.eye(4)))

    assert (found.metric, found.value, found.reference, found.drop) == ("agreement", 0.75, 1.0, 0.25)
    assert (found.labelled, found.samples) == (False, 4)


def test_agreement_of_dense_outputs_is_on_the_native_grid_and_counts_images():
    native = np.zeros((2, 2, 4, 4))
    native[:, 1, :, 2:] = 1.0
    small = np.zeros((2, 2, 2, 2))
    small[:, 1, :, 1:] = 1.0
    small[1, 1, 0, 0] = 1.0

    found = agreement.agree(of(small), of(native), "segmentation")

    assert found.value == (1.0 + 0.75) / 2
    assert found.ci95 == mean_interval(np.array([1.0, 0.75]))


def test_agreement_refuses_other_classes():
    with pytest.raises(InvariantError, match=r"outputs \(2, 3\) do not fit the native model's \(2, 4\)"):
        agreement.agree(of(np.ones((2, 3))), of(np.ones((2, 4))))
