//! Streams CRIU checkpoint images between CRIU and ordinary UNIX pipes.

/// The protobuf messages of `proto/image.proto`.
pub mod image_proto {
    include!(concat!(env!("OUT_DIR"), "/image.rs"));
}

/// The protobuf messages of `proto/criu.proto`.
pub mod criu_proto {
    include!(concat!(env!("OUT_DIR"), "/criu.rs"));
}
