"""What one GPU is measured for, in stages; `benchmarks/gpu_campaign.py` runs them."""
