"""The DeepSeek-V2 and V3 transformer: its configuration, weights and layers."""
