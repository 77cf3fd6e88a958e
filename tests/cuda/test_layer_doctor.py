"""`flashmoe doctor` on a GPU."""

from flashmoe import doctor


def test_the_layer_is_right_and_has_a_time():
    [check] = doctor.gpu_layer("gpu layer")
    assert check.status == doctor.OK, check.found
    assert "us" in check.found
