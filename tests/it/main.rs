//! Integration tests: one crate, one module a topic.

mod decode;
