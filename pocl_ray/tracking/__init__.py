"""Sends the metric stream and the results of a training to trackers: TensorBoard, Weights & Biases, MLflow, Trackio."""
