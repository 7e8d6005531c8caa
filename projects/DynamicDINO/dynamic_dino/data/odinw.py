"""Object Detection in the Wild: 35 small data sets, 13 of which GLIP reports.

Folders, splits and prompts are those of GLIP's configs/odinw_13 and configs/odinw_35; of its two
plantdocs the 416 x 416 one is among the 35, as in mmdetection.
"""

from __future__ import annotations

# name: folder under odinw/; in the "export" ones the splits share the folder with all images
FOLDERS = {
    "AerialMaritimeDrone_large": "AerialMaritimeDrone/large",
    "AerialMaritimeDrone_tiled": "AerialMaritimeDrone/tiled",
    "AmericanSignLanguageLetters": (
        "AmericanSignLanguageLetters/American Sign Language Letters.v1-v1.coco"
    ),
    "Aquarium": "Aquarium/Aquarium Combined.v2-raw-1024.coco",
    "BCCD": "BCCD/BCCD.v3-raw.coco",
    "boggleBoards": "boggleBoards/416x416AutoOrient/export",
    "brackishUnderwater": "brackishUnderwater/960x540",
    "ChessPieces": "ChessPieces/Chess Pieces.v23-raw.coco",
    "CottontailRabbits": "CottontailRabbits",
    "dice": "dice/mediumColor/export",
    "DroneControl": "DroneControl/Drone Control.v3-raw.coco",
    "EgoHands_generic": "EgoHands/generic",
    "EgoHands_specific": "EgoHands/specific",
    "HardHatWorkers": "HardHatWorkers/raw",
    "MaskWearing": "MaskWearing/raw",
    "MountainDewCommercial": "MountainDewCommercial",
    "NorthAmericaMushrooms": "NorthAmericaMushrooms/North American Mushrooms.v1-416x416.coco",
    "openPoetryVision": "openPoetryVision/512x512",
    "OxfordPets_by_breed": "OxfordPets/by-breed",
    "OxfordPets_by_species": "OxfordPets/by-species",
    "PKLot": "PKLot/640",
    "Packages": "Packages/Raw",
    "PascalVOC": "PascalVOC",
    "pistols": "pistols/export",
    "plantdoc": "plantdoc/416x416",
    "pothole": "pothole",
    "Raccoon": "Raccoon/Raccoon.v2-raw.coco",
    "selfdrivingCar": "selfdrivingCar/fixedLarge/export",
    "ShellfishOpenImages": "ShellfishOpenImages/raw",
    "ThermalCheetah": "ThermalCheetah",
    "thermalDogsAndPeople": "thermalDogsAndPeople",
    "UnoCards": "UnoCards/raw",
    "VehiclesOpenImages": "VehiclesOpenImages/416x416",
    "WildfireSmoke": "WildfireSmoke",
    "websiteScreenshots": "websiteScreenshots",
}
ODINW35 = tuple(FOLDERS)
ODINW13 = (
    "AerialMaritimeDrone_large",
    "Aquarium",
    "CottontailRabbits",
    "EgoHands_generic",
    "NorthAmericaMushrooms",
    "Packages",
    "PascalVOC",
    "pistols",
    "pothole",
    "Raccoon",
    "ShellfishOpenImages",
    "thermalDogsAndPeople",
    "VehiclesOpenImages",
)
# Sets whose zero-shot figures GLIP takes on a smaller validation split.
MINIVAL = (
    "brackishUnderwater",
    "DroneControl",
    "EgoHands_generic",
    "EgoHands_specific",
    "openPoetryVision",
    "OxfordPets_by_breed",
    "OxfordPets_by_species",
    "PKLot",
    "UnoCards",
    "VehiclesOpenImages",
    "websiteScreenshots",
)

# GLIP's OVERRIDE_CATEGORY, where it differs from the files' names, and CAPTION_PROMPT: by category
# id, the phrase to ask for. GLIP scores only the tokens of the name within a CAPTION_PROMPT ("hand"
# in "hand of a person"), here the phrase is scored as a whole. Its name of ChessPieces' class 1 is
# blank; that class has no boxes and keeps the name of the file.
PROMPTS: dict[str, dict[int, str]] = {
    "Aquarium": {
        3: "penguin, which is black and white",
        4: "puffin with orange beaks",
        7: "stingray which is flat and round",
    },
    "ChessPieces": {
        i: f"{color} {piece}"
        for i, (color, piece) in enumerate(
            [
                (color, piece)
                for color in ("black", "white")
                for piece in ("bishop", "king", "knight", "pawn", "queen", "rook")
            ],
            start=2,
        )
    },
    "CottontailRabbits": {1: "rabbit"},
    "EgoHands_generic": {1: "hand of a person"},
    "NorthAmericaMushrooms": {1: "flat mushroom", 2: "yellow mushroom"},
    "Packages": {1: "there is a package on the porch"},
    "pothole": {1: "there are some holes on the road"},
}
SPLITS = {"train": "train", "val": "valid", "test": "test", "minival": "mini_val"}


def odinw_names(sets: tuple[str, ...], split: str = "val", prompts: bool = False) -> list[str]:
    """The registered names of one split of these sets, with GLIP's prompts where it has any."""
    return [
        f"odinw_{name}_{split}{'_prompts' if prompts and name in PROMPTS else ''}" for name in sets
    ]


def splits_of(name: str) -> list[str]:
    """PascalVOC's test split is its val split, so that it isn't listed."""
    splits = ["train", "val"] if name == "PascalVOC" else ["train", "val", "test"]
    return [*splits, "minival"] if name in MINIVAL else splits


def files_of(name: str, split: str) -> list[tuple[str, str]]:
    """Where (annotations, images) of a split may lie, GLIP's place first. The second place is the
    same without the folder of the version, as in ``odinw/Raccoon/valid``."""
    folder = FOLDERS[name]
    if folder.endswith("export"):
        file = f"odinw/{folder}/{split}_annotations_without_background.json"
        return [(file, f"odinw/{folder}")]
    folders = [folder, folder.split("/")[0]] if folder.endswith(".coco") else [folder]
    images = [f"odinw/{folder}/{SPLITS[split]}" for folder in folders]
    return [(f"{image}/annotations_without_background.json", image) for image in images]
