import base64
import io

import numpy as np
import pytest
from PIL import Image
from safetensors.numpy import load_file, save_file

from epsball.report.gallery import load


def pixels(uri):
    assert uri.startswith("data:image/png;base64,")
    return np.asarray(Image.open(io.BytesIO(base64.b64decode(uri.split(",", 1)[1]))))


@pytest.mark.parametrize("shape", [(1, 8, 8), (3, 8, 8), (4, 8, 8), (8, 8)])
@pytest.mark.parametrize("as_bytes", [True, False])
def test_pictures_show_the_stored_inputs(build, tmp_path, shape, as_bytes):
    path = build.evidence(tmp_path / "e.safetensors", shape, as_bytes)
    found = load(build.report(), path)
    assert found.image == (True, True)
    panel = found.panels[1][0]
    assert (panel.threat, panel.broken, panel.note) == ("linf", 6, "")
    first = panel.pictures[0]
    assert (first.label, first.predicted, first.radius_text, first.size) == ("class 3", "class 4", "0.05", "0.0498")
    stored = load_file(str(path))["m1/x"][3]
    stored = stored if as_bytes else np.rint(stored * 255)
    shown = pixels(first.clean)
    assert np.array_equal(np.moveaxis(shown, -1, 0) if shown.ndim == 3 else shown, stored.squeeze())
    assert first.gain == 10


def test_one_of_each_class_first_and_unchanged_samples_never(build, tmp_path):
    pictures = load(build.report(), build.evidence(tmp_path / "e.safetensors")).panels[0][0].pictures
    assert [p.label for p in pictures] == ["class 3", "class 4", "class 5", "class 6"]


def test_the_difference_is_white_where_nothing_changed_and_signed_elsewhere(build, tmp_path):
    path = build.evidence(tmp_path / "e.safetensors")
    tensors = load_file(str(path))
    tensors["m0/x"][:] = 128
    moved = np.full((6, 1, 8, 8), 128 / 255, dtype=np.float32)
    moved[:, 0, 0, 0] += 0.1
    moved[:, 0, 0, 1] -= 0.1
    tensors["m0/linf/x_adv"] = moved
    save_file(tensors, str(path))
    shown = pixels(load(build.report(), path).panels[0][0].pictures[0].difference)
    assert tuple(shown[5, 5]) == (255, 255, 255)
    assert shown[0, 0, 0] > shown[0, 0, 2]
    assert shown[0, 1, 2] > shown[0, 1, 0]


def test_a_model_box_other_than_0_1(build, tmp_path):
    path = build.evidence(tmp_path / "e.safetensors", as_bytes=False)
    tensors = load_file(str(path))
    for key in ("m0/x", "m0/linf/x_adv"):
        tensors[key] = tensors[key] * 2 - 1
    save_file(tensors, str(path))
    first, second = (load(build.report(build.model("a", 1.0, box=box)), p) for box, p in (((-1.0, 1.0), path), ((0.0, 1.0), path)))
    assert first.panels[0][0].pictures[0].clean != second.panels[0][0].pictures[0].clean


def test_missing_and_damaged_files_are_a_sentence(build, tmp_path):
    report = build.report()
    assert "no pictures" in load(report, None).note
    assert "missing" in load(report, tmp_path / "none").note
    assert "missing" in load(report, tmp_path).note
    bad = tmp_path / "bad"
    bad.write_bytes(b"\xff" * 100)
    assert "could not be read" in load(report, bad).note
    whole = build.evidence(tmp_path / "e.safetensors").read_bytes()
    bad.write_bytes(whole[: len(whole) // 2])
    assert "could not be read" in load(report, bad).note


def drop_threat(tensors):
    del tensors["m0/linf/rows"]


def short_radius(tensors):
    tensors["m0/linf/radius"] = tensors["m0/linf/radius"][:2]


def rows_outside(tensors):
    tensors["m0/linf/rows"] = tensors["m0/linf/rows"] + 100


def other_shape(tensors):
    tensors["m0/linf/x_adv"] = tensors["m0/linf/x_adv"][..., :4].copy()


def nothing_broken(tensors):
    for key in ("rows", "x_adv", "radius", "predicted", "size"):
        tensors[f"m0/linf/{key}"] = tensors[f"m0/linf/{key}"][:0]


def scalar_rows(tensors):
    tensors["m0/linf/rows"] = np.array(3)


@pytest.mark.parametrize("damage", [drop_threat, short_radius, rows_outside, other_shape, nothing_broken])
def test_one_bad_threat_loses_only_its_own_pictures(build, tmp_path, damage):
    path = build.evidence(tmp_path / "e.safetensors")
    tensors = load_file(str(path))
    damage(tensors)
    save_file(tensors, str(path))
    panels = load(build.report(), path).panels
    assert not panels[0][0].pictures
    assert panels[0][0].note
    assert panels[0][1].pictures
    assert panels[1][0].pictures


def test_tensors_of_the_wrong_rank_never_raise(build, tmp_path):
    path = build.evidence(tmp_path / "e.safetensors")
    tensors = load_file(str(path))
    scalar_rows(tensors)
    save_file(tensors, str(path))
    found = load(build.report(), path)
    assert found.note or found.panels[0][0].note


def test_inputs_that_are_no_images_are_said_to_be_so(build, tmp_path):
    found = load(build.report(), build.evidence(tmp_path / "e.safetensors", shape=(64,)))
    assert found.image == (False, False)
    assert "shape 64" in found.panels[0][0].note


def test_large_pictures_are_reduced(build, tmp_path):
    found = load(build.report(), build.evidence(tmp_path / "e.safetensors", shape=(3, 400, 300)))
    picture = found.panels[0][0].pictures[0]
    assert not picture.pixelated
    assert max(pixels(picture.clean).shape) == 192
