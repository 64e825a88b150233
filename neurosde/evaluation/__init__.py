"""Evaluation of posteriors: recovery, calibration, prediction, baselines, reports and benchmarks."""
