#!/bin/sh
# Train the teachers of the worlds: sh benchmarks/universal/teachers.sh DATA
#
# DATA holds glyphs.npz and FashionMNIST/raw/ (README.md beside this file). Each teacher goes to
# DATA/teachers/NAME/teacher.safetensors; those that are there are left alone.
#
# Students never see what a teacher was trained on. Fashion-MNIST: students train on `embedded`, teachers on
# `fashion_mnist_rest`, which are the other training images. Glyphs: of the order that split_seed 0 gives, students take
# the first (data.meta_validation_size and then data.train_size of them); a teacher leaves as many as its
# meta_validation_size to them. Students of another split_seed share by chance one image in 5 with `glyphs-strong`, one
# in 50 with `glyphs-mid`, one in 250 with `glyphs-weak`.
set -e
data=$1

train() {
    name=$1
    shift
    test -e "$data/teachers/$name/teacher.safetensors" || python -m lkd.cli teacher --run_dir "$data/teachers/$name" \
        --data.root "$data" --model.name small_resnet "$@"
}

train glyphs-weak --data.name npz/glyphs --data.meta_validation_size 8000 --data.train_size 400 --train.epochs 20
train fashion-weak --data.name fashion_mnist_rest --data.meta_validation_size 2000 --data.train_size 250 \
    --train.epochs 40
train fashion-fair --data.name fashion_mnist_rest --data.meta_validation_size 2000 --data.train_size 400 \
    --train.epochs 40
train fashion-mid --data.name fashion_mnist_rest --data.meta_validation_size 2000 --data.train_size 1000 \
    --train.epochs 20
train glyphs-mid --data.name npz/glyphs --data.meta_validation_size 8000 --data.train_size 2000 --train.epochs 10
train glyphs-strong --data.name npz/glyphs --data.meta_validation_size 12000 --data.train_size 20000 --train.epochs 6
