"""The HTTP service: a SavedModel behind TensorFlow Serving's REST paths, and a page to look at it.

It needs the extra `serve`, and of TensorFlow only what loads a SavedModel.
"""
