//! The process runtime: sessions as process groups of this machine, with nothing to install.
