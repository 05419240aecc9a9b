//! SPIFFE Workload API.
