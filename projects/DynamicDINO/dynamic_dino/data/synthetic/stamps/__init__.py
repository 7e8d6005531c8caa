"""Stamps: a small open-vocabulary detection set, composed of real photo cut-outs on real photos.

    python -m dynamic_dino.data.synthetic.stamps           fetches the sources, composes a set
    python -m dynamic_dino.data.synthetic.stamps --sheet   also draws what came out

Layout under the data root (``$DETECTRON2_DATASETS``, or ``datasets``)::

    stamps/{train,val,val_novel}/000000.jpg         composed; longest side 320 px
    stamps/val_real/<rcc stem>/<photo>.webp         real photos, as they are
    stamps/annotations/{train,val,val_novel,val_real}.json      COCO; one list of categories for all

train has the seen phrases with long-tailed frequencies, val the same phrases (uniform) on
backgrounds of its own, val_novel phrases that training never shows, and val_real real photos with
boxes drawn by hand. A category has, besides id and name: "frequency" (r, c, f; null if novel),
"novel", "image_count" (in train) and "near_synonyms", the ids that must never be its negatives.
Note that seen phrases of val show the cut-outs of train, warped and re-lit in another way: that
measures recognition of known pictures, val_real the step to real objects.

Sources, pinned by version and sha256 in ``sources.py`` and fetched, never part of this repository:

- Debian ``tuxpaint-stamps-default`` 2022.06.04-1: cut-outs with descriptions, GPL-2. Which are
  used, and how their descriptions became phrases, is in ``vocabulary.json``.
- Debian ``gcompris-qt-data`` 3.1-2: photos of monuments and landscapes (backgrounds), of animals,
  tools and household things (val_real), drawn sprites; free licences, per picture in the READMEs
  inside the package. The licence and author of each val_real photo are repeated in
  ``val_real.json``.

sources -> vocabulary -> library -> compose -> build -> cli is the order of the data and of reading.
"""
