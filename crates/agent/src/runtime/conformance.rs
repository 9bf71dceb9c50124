//! The rules of [`Runtime`](super::Runtime) as a test suite for any implementation.
