//! The shared map types of the eBPF programs.
#![no_std]
