"""`pocl-ray experiment`: arms are trained on the same seeds and compared in pairs, with intervals."""
