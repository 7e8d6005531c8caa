"""A web page to try detectors on: a picture and names in, boxes out.

looking   what the page shows, without the page
app       the page, of Gradio
cli       the command ``python -m dynamic_dino.page``
"""
