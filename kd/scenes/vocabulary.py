"""Vocabulary of the embedded scenes: their kinds, and where and next to what each class occurs.

Changing a number changes the fingerprint of the generated datasets.
"""

from __future__ import annotations

Weights = dict[str, float]

FLOOR = 0.02  # weight of a class at a place where it does not belong
PULL = 1.6  # log odds added by a companion at distance 0
REACH = 17.0  # a companion's pull at distance d is PULL * exp(-d^2 / (2 REACH^2))
SIZE_SPREAD = 0.14  # standard deviation of log width and log height
PLACE_SCALE = (0.9, 1.0, 1.1)  # objects in front are larger

# class: (look, supercategory). Five looks are shared by two classes each.
CLASSES: dict[str, tuple[str, str]] = {
    "ball": ("disc", "toy"), "orange": ("disc", "food"), "bird": ("wing", "animal"),
    "kite": ("wing", "toy"), "cone": ("wedge", "traffic"), "tent": ("wedge", "outdoor"),
    "crate": ("block", "container"), "parcel": ("block", "container"), "mug": ("cup", "tableware"),
    "flowerpot": ("cup", "plant"), "person": ("person", "person"), "dog": ("dog", "animal"),
    "car": ("car", "vehicle"), "boat": ("boat", "vehicle"), "tree": ("tree", "plant"),
    "bench": ("bench", "outdoor"), "umbrella": ("umbrella", "outdoor"),
    "cloud": ("cloud", "outdoor"), "lamp": ("lamp", "furniture"),
    "laptop": ("laptop", "electronics"), "plate": ("plate", "tableware"),
    "kettle": ("kettle", "tableware"),
}  # fmt: skip

# look: typical width and height, the same for confusable classes by construction.
LOOK_SIZES: dict[str, tuple[float, float]] = {
    "disc": (11.0, 11.0), "wing": (15.0, 10.0), "wedge": (12.0, 14.0), "block": (14.0, 13.0),
    "cup": (10.0, 13.0), "person": (10.0, 20.0), "dog": (15.0, 12.0), "car": (20.0, 12.0),
    "boat": (18.0, 17.0), "tree": (15.0, 20.0), "bench": (19.0, 11.0), "umbrella": (18.0, 15.0),
    "cloud": (20.0, 10.0), "lamp": (9.0, 18.0), "laptop": (16.0, 14.0), "plate": (17.0, 9.0),
    "kettle": (13.0, 15.0),
}  # fmt: skip

PLACE_NAMES: dict[str, tuple[str, str, str]] = {
    "harbour": ("sky", "water", "quay"),
    "beach": ("sky", "water", "sand"),
    "street": ("sky", "pavement", "road"),
    "park": ("sky", "hedge", "lawn"),
    "kitchen": ("shelf", "worktop", "table"),
    "desk": ("shelf", "wall", "desk"),
}

# For each kind of scene, weights of the classes at the top, in the middle and at the bottom.
# Confusable classes have equal weights in most places, so that neither kind nor place separates
# them there.
BASE: dict[str, tuple[Weights, Weights, Weights]] = {
    "harbour": (
        {"cloud": 2, "bird": 2, "kite": 2},
        {"boat": 4, "crate": 1, "parcel": 1, "person": 1},
        {"crate": 2, "parcel": 2, "car": 2, "person": 1.5, "boat": 0.5},
    ),
    "beach": (
        {"cloud": 1.5, "bird": 1.5, "kite": 1.5},
        {"boat": 1.5, "person": 1.5, "bird": 0.7, "kite": 0.7, "tree": 0.7},
        {"umbrella": 2, "ball": 1.5, "orange": 1.5, "dog": 1.5, "tent": 0.5},
    ),
    "street": (
        {"lamp": 2, "cloud": 1, "tree": 1},
        {"car": 2, "tree": 1.5, "lamp": 1, "parcel": 1, "crate": 1, "bench": 1},
        {"cone": 2, "tent": 2, "car": 2, "dog": 1},
    ),
    "park": (
        {"tree": 1, "bird": 1.5, "kite": 1.5, "cloud": 0.5},
        {"tree": 2, "bench": 1.5, "tent": 1, "cone": 1, "lamp": 1, "person": 1},
        {"ball": 1.5, "orange": 1.5, "dog": 2, "umbrella": 1, "bench": 0.5},
    ),
    "kitchen": (
        {"plate": 2, "mug": 1.2, "flowerpot": 1.2, "lamp": 0.5},
        {"kettle": 2, "mug": 1.2, "flowerpot": 1.2, "lamp": 1, "crate": 0.7, "parcel": 0.7},
        {"orange": 1.5, "ball": 1.5, "plate": 2, "dog": 1.5, "kettle": 0.5},
    ),
    "desk": (
        {"lamp": 2, "flowerpot": 1.2, "mug": 1.2, "plate": 0.5},
        {"laptop": 2, "kettle": 1.5, "parcel": 1.2, "crate": 1.2, "lamp": 0.5},
        {"laptop": 2, "mug": 1.5, "flowerpot": 1.5, "lamp": 1, "plate": 1},
    ),
}

# Companions attract each other and repel each other's confusable partners.
FRIENDS: dict[str, tuple[str, ...]] = {
    "ball": ("dog", "person"),
    "orange": ("plate", "umbrella"),
    "bird": ("boat", "tree"),
    "kite": ("person", "umbrella", "cloud"),
    "cone": ("car", "lamp"),
    "tent": ("tree", "dog", "bench"),
    "crate": ("boat", "kettle", "bench"),
    "parcel": ("car", "laptop", "person"),
    "mug": ("laptop", "kettle"),
    "flowerpot": ("lamp", "plate"),
}
