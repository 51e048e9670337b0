"""The detection metric on boxes made by hand, suppression, and the way of an image to the model."""

import io
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from benchmarks.accuracy.coco import (
    GREY,
    IOU_THRESHOLDS,
    MAX_DETECTIONS,
    Detections,
    Objects,
    Score,
    evaluate,
    letterbox,
    nms,
    overlaps,
    read_archive,
    read_labels,
)

Image = pytest.importorskip("PIL.Image")
Box = tuple[float, float, float, float]
LEFT, RIGHT, BELOW = (0, 0, 100, 100), (200, 0, 300, 100), (0, 200, 100, 300)


def objects(*found: tuple[Box, int]) -> Objects:
    """(box, class) ..."""
    boxes = np.array([box for box, _ in found], dtype=float).reshape(-1, 4)
    return Objects(boxes, np.array([label for _, label in found], dtype=np.int64))


def detections(*found: tuple[Box, float, int]) -> Detections:
    """(box, score, class) ..., best first"""
    boxes, classes = objects(*((box, label) for box, _, label in found))
    return Detections(boxes, np.array([score for _, score, _ in found], dtype=float), classes)


def both(value: float) -> Score:
    return Score(pytest.approx(value), pytest.approx(value))


def test_overlaps_by_hand() -> None:
    a = np.array([[0, 0, 2, 2], [5, 5, 5, 5]], dtype=float)
    b = np.array([[0, 0, 2, 2], [1, 1, 3, 3], [2, 0, 4, 2], [5, 5, 5, 5]], dtype=float)
    assert overlaps(a, b) == pytest.approx(np.array([[1, 1 / 7, 0, 0], [0, 0, 0, 0]]))


def test_perfect_detections_score_one() -> None:
    shown = [objects((LEFT, 0), (RIGHT, 0), (BELOW, 7)), objects((LEFT, 7))]
    found = [
        detections((RIGHT, 0.9, 0), (LEFT, 0.3, 0), (BELOW, 0.2, 7)),
        detections((LEFT, 0.8, 7)),
    ]
    assert evaluate(found, shown) == both(1)


def test_a_miss_costs_the_recalls_beyond() -> None:
    found = [detections((LEFT, 0.9, 0))]
    # recalls 0, 0.01, ..., 0.50 are reached
    assert evaluate(found, [objects((LEFT, 0), (RIGHT, 0))]) == both(51 / 101)


def test_a_duplicate_is_a_false_positive() -> None:
    shown = [objects((LEFT, 0), (RIGHT, 0))]
    found = [detections((LEFT, 0.9, 0), (LEFT, 0.8, 0), (RIGHT, 0.7, 0))]
    # precision 1 up to recall 0.5, then 2 of 3
    assert evaluate(found, shown) == both((51 + 50 * 2 / 3) / 101)
    behind = [detections((LEFT, 0.9, 0), (RIGHT, 0.7, 0), (LEFT, 0.6, 0))]
    assert evaluate(behind, shown) == both(1)


def test_precision_is_the_best_at_that_recall_or_beyond() -> None:
    shown = [objects((LEFT, 0), (RIGHT, 0))]
    found = [detections((BELOW, 0.9, 0), (LEFT, 0.8, 0), (RIGHT, 0.7, 0))]
    # 0 of 1, 1 of 2, 2 of 3: the last one counts everywhere
    assert evaluate(found, shown) == both(2 / 3)


def test_scores_rank_over_all_images() -> None:
    shown = [objects((LEFT, 0)), objects((LEFT, 0))]
    found = [detections((RIGHT, 0.5, 0)), detections((LEFT, 0.9, 0))]
    assert evaluate(found, shown) == both(51 / 101)
    wrong_first = [detections((RIGHT, 0.95, 0)), detections((LEFT, 0.9, 0))]
    assert evaluate(wrong_first, shown) == both(51 / 101 / 2)


def test_a_wrong_class_finds_nothing() -> None:
    assert evaluate([detections((LEFT, 0.9, 1))], [objects((LEFT, 0))]) == both(0)
    swapped = [detections((LEFT, 0.9, 1), (RIGHT, 0.8, 0))]
    assert evaluate(swapped, [objects((LEFT, 0), (RIGHT, 1))]) == both(0)


def test_classes_count_alike_and_only_where_shown() -> None:
    shown = [objects((LEFT, 0), (RIGHT, 0), (BELOW, 3))]
    found = [detections((BELOW, 0.9, 5), (LEFT, 0.8, 0), (RIGHT, 0.7, 0))]
    assert evaluate(found, shown) == both(0.5)  # class 0 all, class 3 none, class 5 is not shown


def test_iou_decides_at_which_thresholds_a_box_counts() -> None:
    assert IOU_THRESHOLDS.round(6).tolist() == [step / 20 for step in range(10, 20)]
    found = [detections(((0, 0, 72, 100), 0.9, 0))]  # IoU 0.72: 0.50 to 0.70
    assert evaluate(found, [objects((LEFT, 0))]) == (pytest.approx(1), pytest.approx(0.5))
    found = [detections(((0, 0, 49, 100), 0.9, 0))]
    assert evaluate(found, [objects((LEFT, 0))]) == both(0)


def test_each_detection_takes_the_object_that_it_overlaps_most() -> None:
    shifted = (30, 0, 130, 100)
    shown = [objects((LEFT, 0), (shifted, 0))]
    # the first overlaps both objects, IoU 0.54 and 1; the second fits LEFT alone, IoU 0.82
    found = [detections((shifted, 0.9, 0), ((0, 0, 82, 100), 0.8, 0))]
    expected = (7 + 3 * 51 / 101) / 10  # at thresholds to 0.80 both are found
    assert evaluate(found, shown) == (pytest.approx(1), pytest.approx(expected))


def test_images_without_objects_or_detections() -> None:
    shown = [objects(), objects((LEFT, 0))]
    assert evaluate([detections(), detections((LEFT, 0.9, 0))], shown) == both(1)
    assert evaluate([detections((LEFT, 0.95, 0)), detections((LEFT, 0.9, 0))], shown) == both(0.5)
    assert evaluate([detections(), detections()], shown) == both(0)
    with pytest.raises(ValueError, match="no object in any of 1 images"):
        evaluate([detections()], [objects()])


def predictions(*rows: tuple[float, ...]) -> Tensor:
    """Centre x, centre y, width, height, objectness, scores of two classes ..."""
    return torch.tensor(rows, dtype=torch.float32)


def test_nms_keeps_the_best_of_a_pile_in_each_class() -> None:
    found = nms(
        predictions(
            (50, 50, 100, 100, 0.5, 0.8, 0.0),
            (52, 50, 100, 100, 0.9, 0.9, 0.0),  # the best of the pile
            (54, 50, 100, 100, 0.9, 0.0, 0.5),  # of another class
            (300, 50, 100, 100, 0.5, 0.4, 0.0),  # elsewhere
        )
    )
    assert found.scores == pytest.approx(np.array([0.81, 0.45, 0.2]))
    assert found.classes.tolist() == [0, 1, 0]
    assert found.boxes.tolist() == [[2, 0, 102, 100], [4, 0, 104, 100], [250, 0, 350, 100]]


def test_nms_judges_by_kept_boxes_only() -> None:
    """The second is hidden by the first, and so cannot hide the third."""
    found = nms(
        predictions(
            (50, 50, 100, 100, 1, 0.9, 0), (70, 50, 100, 100, 1, 0.8, 0),
            (90, 50, 100, 100, 1, 0.7, 0),
        )
    )  # fmt: skip
    assert found.scores == pytest.approx(np.array([0.9, 0.7]))


def test_nms_counts_a_box_once_for_each_likely_class() -> None:
    found = nms(predictions((50, 50, 100, 100, 0.5, 0.5, 0.25), (9, 9, 9, 9, 0.0005, 1, 1)))
    assert found.scores == pytest.approx(np.array([0.25, 0.125]))
    assert found.classes.tolist() == [0, 1]
    nothing = nms(predictions((9, 9, 9, 9, 0.0005, 1, 1)))
    assert nothing.boxes.shape == (0, 4)


def test_nms_stops_at_the_most_detections() -> None:
    apart = [(20.0 * i, 5, 10, 10, 1, 1 - i / 1000, 0) for i in range(MAX_DETECTIONS + 5)]
    found = nms(predictions(*reversed(apart)))
    assert len(found.scores) == MAX_DETECTIONS
    assert found.scores[0] == 1


@pytest.mark.parametrize(
    ("size", "scale", "left", "top"),
    [
        ((640, 480), 1.0, 0, 80),
        ((1000, 500), 0.64, 0, 160),
        ((240, 320), 2.0, 80, 0),
        ((640, 427), 1.0, 0, 106),  # 213 rows of border: 106 above, 107 below
        ((64, 64), 10.0, 0, 0),
    ],
)
def test_letterbox_fits_and_centres(
    size: tuple[int, int], scale: float, left: int, top: int
) -> None:
    pixels, placement = letterbox(Image.new("RGB", size, (255, 0, 10)))
    assert placement == (pytest.approx(scale), left, top, *size)
    assert pixels.shape == (3, 640, 640)
    assert pixels.dtype == torch.uint8
    inside = torch.zeros(640, 640, dtype=torch.bool)
    inside[top : top + round(size[1] * scale), left : left + round(size[0] * scale)] = True
    for channel, colour in zip(pixels, (255, 0, 10), strict=True):
        assert (channel[inside] == colour).all()
        assert (channel[~inside] == GREY).all()


def test_placement_takes_a_box_back_to_the_image() -> None:
    image = Image.new("RGB", (200, 100))
    image.paste((255, 255, 255), (40, 20, 120, 60))
    pixels, placement = letterbox(image)
    rows, columns = (pixels[0] == 255).nonzero(as_tuple=True)
    box = [[columns.min(), rows.min(), columns.max() + 1, rows.max() + 1]]
    assert placement.undo(np.array(box, dtype=float)) == pytest.approx(
        np.array([[40, 20, 120, 60]]), abs=1
    )


def test_placement_cuts_boxes_off_at_the_edges_of_the_image() -> None:
    _, placement = letterbox(Image.new("RGB", (640, 480)))
    boxes = placement.undo(np.array([[-5, 0, 700, 640], [10, 90, 20, 100]], dtype=float))
    assert boxes.tolist() == [[0, 0, 640, 480], [10, 10, 20, 20]]


def archive(path: Path, images: dict[str, tuple[int, int]], labels: dict[str, str]) -> Path:
    with zipfile.ZipFile(path, "w") as file:
        for name, size in images.items():
            encoded = io.BytesIO()
            Image.new("RGB", size).save(encoded, "JPEG")
            file.writestr(f"images/{name}.jpg", encoded.getvalue())
        for name, text in labels.items():
            file.writestr(f"labels/{name}.txt", text)
    return path


def test_read_archive(tmp_path: Path) -> None:
    images = {"b": (100, 50), "a": (40, 80), "c": (10, 10)}
    labels = {"b": "3 0.5 0.5 0.2 0.4\n0 0.1 0.2 0.2 0.4\n", "c": "\n"}
    path = archive(tmp_path / "few.zip", images, labels)
    examples = read_archive(path)
    assert [example.name for example in examples] == ["a", "b", "c"]
    assert [len(example.objects.classes) for example in examples] == [0, 2, 0]
    assert examples[1].placement[3:] == (100, 50)
    assert examples[1].objects.classes.tolist() == [3, 0]
    expected = np.array([[40, 15, 60, 35], [0, 0, 20, 20]])
    assert examples[1].objects.boxes == pytest.approx(expected)
    assert [example.name for example in read_archive(path, limit=2)] == ["a", "b"]


def test_bad_archives_and_labels_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"holds no \.jpg file"):
        read_archive(archive(tmp_path / "empty.zip", {}, {}))
    with pytest.raises(ValueError, match="labels without an image: b"):
        read_archive(archive(tmp_path / "orphan.zip", {"a": (8, 8)}, {"a": "", "b": ""}))
    with pytest.raises(ValueError, match=r"needs 5 numbers in each line, got '1 0.5'"):
        read_labels("1 0.5", 10, 10)
