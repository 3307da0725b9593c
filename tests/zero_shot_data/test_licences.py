import pytest

from hf_robust_clip.zero_shot_data.licences import Licence, licence_of
from hf_robust_clip.zero_shot_data.specs import SPECS


def test_licences_of_known_datasets():
    assert licence_of("digits") == Licence("cc-by-4.0")
    assert licence_of("fashion_mnist") == licence_of("zalando-datasets/fashion_mnist") == Licence("mit")
    assert licence_of("cifar10") == licence_of("nobody/knows") == Licence()
    assert licence_of("ILSVRC/imagenet-1k").forbids_copies and licence_of("tiny_imagenet").forbids_copies
    assert {spec.license for spec in SPECS} <= {"", "mit", "cc-by-4.0", "cc-by-sa-4.0", "cc0-1.0"}


@pytest.mark.parametrize(
    ("readme", "licence"),
    [
        (None, Licence()),
        ("just words", Licence()),
        ("---\nlicense: mit\n---\n", Licence("mit")),
        ("---\nlicense: unknown\n---\n", Licence()),
        ("---\nlicense: [mit, cc0-1.0]\n---\n", Licence()),
        ("---\nlicense: cc-by-nc-nd-4.0\n---\n", Licence("cc-by-nc-nd-4.0", forbids_copies=True)),
        ("---\nlicense: [mit\n---\n", Licence()),
        ("---\n- a\n---\n", Licence()),
    ],
)
def test_licence_of_a_folder(readme, licence, tmp_path):
    if readme is not None:
        (tmp_path / "README.md").write_text(readme)
    assert licence_of(str(tmp_path)) == licence
