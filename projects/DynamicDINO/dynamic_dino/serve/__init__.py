"""A server: an image and names in, detections as JSON out, over HTTP.

cli        the command ``python -m dynamic_dino.serve``
server     uvicorn, which answers what it accepted before it stops
app        the addresses, as a FastAPI application
bodies     what a request says: forms and JSON -> image, prompt, options
unread     what a refused request still sends
admission  how many requests are let in, and how many pixels they hold
batching   requests that wait at the same time go through the detector together
metrics    what Prometheus reads

All but `cli` and `admission` need the extra "serve".
"""
