"""Data sets in the formats of annotation tools: Pascal VOC, YOLO, LabelMe, CVAT, Label Studio, CSV.

Each format has its own small reader here, on the standard library and PyYAML. `datumaro` reads no
Label Studio and no CSV of boxes, pins Pillow below 13, and brings pandas, pyarrow, lxml, shapely
and more; `supervision` reads no CVAT, Label Studio or CSV, decodes every image, and brings PyAV.
Neither names the file, the line and the remedy of a mistake, which every reader here does.

`recognise` says what a file or folder is; a reader hands images and boxes to a `Collector`, whose
columns go the way of all others: the same checks of boxes, the same `Records`.
"""

from .load import load_recognised
from .recognise import Recognised, recognise

__all__ = ["Recognised", "load_recognised", "recognise"]
