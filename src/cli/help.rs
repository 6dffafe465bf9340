//! The examples that `--help` and the manual page show below the options.

pub(super) const CAPTURE: &str = "\
EXAMPLES:
    # Checkpoint process 1234 to a compressed file. Run `criu dump` when the line `socket-init` has come.
    criu-image-streamer --images-dir images capture | lz4 >app.lz4
    criu dump --stream --images-dir images --tree 1234

    # Upload it as four objects, and fail if any of the uploads does.
    criu-image-streamer --images-dir images --num-shards 4 \\
        --shard-cmd 'lz4 | aws s3 cp - s3://checkpoints/app/{}.lz4' capture";

pub(super) const EXTRACT: &str = "\
EXAMPLES:
    # Write the image's files to a directory, and restore from there without the streamer.
    lz4 -d <app.lz4 | criu-image-streamer --images-dir images extract
    criu restore --images-dir images";

pub(super) const SERVE: &str = "\
EXAMPLES:
    # Restore from a compressed file. Run `criu restore` when the line `socket-init` has come.
    lz4 -d <app.lz4 | criu-image-streamer --images-dir images serve
    criu restore --stream --images-dir images

    # Download it from four objects, and serve nothing if any of the downloads fails.
    criu-image-streamer --images-dir images --num-shards 4 \\
        --shard-cmd 'aws s3 cp s3://checkpoints/app/{}.lz4 - | lz4 -d' serve";

pub(super) const ALL: &str = "\
EXAMPLES:
    # Checkpoint process 1234 to a compressed file, and restore it. Run `criu` when the line `socket-init` has come.
    criu-image-streamer --images-dir images capture | lz4 >app.lz4
    criu dump --stream --images-dir images --tree 1234

    lz4 -d <app.lz4 | criu-image-streamer --images-dir images serve
    criu restore --stream --images-dir images

    More of them: criu-image-streamer capture --help, extract --help, serve --help";
