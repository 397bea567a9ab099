"""Keras callbacks: TensorBoard, checkpoints and resume, early stopping, protection from NaN."""
