"""PEFT's and transformers' own adapter calls on a model with 4-bit experts: new adapters, files in, files out."""
