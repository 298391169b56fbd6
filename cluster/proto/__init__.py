"""The wire format of trivium.v1, and what protoc makes of it."""
