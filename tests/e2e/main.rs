//! The end-to-end tests: one binary, so that everything is linked once.
