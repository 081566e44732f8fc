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
        --data.root "$data" --model.name small_resnet "$@" --resume auto
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
# Taught on the students' own images, with their own wrong labels: what most people have.
train fashion-own --data.train_size 4000 --data.meta_validation_size 4000 --train.epochs 10
train fashion-noisy-own --data.train_size 4000 --data.meta_validation_size 4000 --data.label_noise 0.4 --train.epochs 10
train glyphs-own --data.name npz/glyphs --data.meta_validation_size 4000 --data.train_size 4000 --train.epochs 15
train glyphs-noisy-own --data.name npz/glyphs --data.meta_validation_size 4000 --data.train_size 4000 \
    --data.label_noise 0.3 --train.epochs 15

# For the worlds in which losses are judged (worlds.yaml); no loss is learned with these.
train digits-strong --data.name npz/digits --data.meta_validation_size 600 --data.train_size 600 --train.epochs 40
train digits-weak --data.name npz/digits --data.meta_validation_size 600 --data.train_size 50 --train.epochs 40 \
    --train.batch_size 25
train cyrillic-weak --data.name npz/cyrillic --data.meta_validation_size 8000 --data.train_size 450 --train.epochs 20
train cyrillic-equal --data.name npz/cyrillic --data.meta_validation_size 8000 --data.train_size 2000 --train.epochs 10
train cyrillic-strong --data.name npz/cyrillic --data.meta_validation_size 8000 --data.train_size 16000 --train.epochs 7
train cyrillic-own --data.name npz/cyrillic --data.meta_validation_size 4000 --data.train_size 4000 --train.epochs 20
train greek-weak --data.name npz/greek --data.meta_validation_size 6000 --data.train_size 400 --train.epochs 20
train greek-strong --data.name npz/greek --data.meta_validation_size 6000 --data.train_size 12000 --train.epochs 8
train greek-noisy-own --data.name npz/greek --data.meta_validation_size 4000 --data.train_size 2000 \
    --data.label_noise 0.35 --train.epochs 20
train cjk-weak --data.name npz/cjk --data.meta_validation_size 10000 --data.train_size 4000 --train.epochs 12
train cjk-strong --data.name npz/cjk --data.meta_validation_size 10000 --data.train_size 16000 --train.epochs 10

# For the worlds that were made after every choice (confirmation.yaml).
train accents-strong --data.name npz/accents --data.meta_validation_size 8000 --data.train_size 20000 --train.epochs 8
train accents-equal --data.name npz/accents --data.meta_validation_size 8000 --data.train_size 6000 --train.epochs 10
train kana-strong --data.name npz/kana --data.meta_validation_size 8000 --data.train_size 16000 --train.epochs 10
train kana-own --data.name npz/kana --data.meta_validation_size 4000 --data.train_size 3000 --train.epochs 25
