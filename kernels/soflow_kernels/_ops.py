"""The library that the operations are registered in. A build for Hugging Face's kernel hub has another in this place,
so that several builds, and the installed package beside them, live in one process."""


def add_op_namespace_prefix(name: str) -> str:
    """The full name of an operation, NAMESPACE::name."""
    return f"soflow::{name}"
