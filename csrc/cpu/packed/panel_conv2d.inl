// The driver of packed_conv2d: a copy of each image, then tasks of some output pixels, of one or several images, by a
// strip of channels.

// Where the activations of `count` output pixels of a wave begin, and kTile more that may be read as well.
inline void place_pixels(const PackedCall& call, const CopyPlan& plan, const char* activations, int64_t first,
                         int64_t count, const char** position) {
  const int64_t positions = call.out_height * call.out_width, step = call.stride_w * plan.pixel;
  int64_t image = first / positions, h = first % positions / call.out_width, w = first % call.out_width;
  for (int64_t i = 0; i < count; w = 0) {
    const int64_t end = i + smaller(call.out_width - w, count - i);
    const char* at = activations + image * plan.image + h * call.stride_h * plan.row + w * step;
    for (; i < end; ++i, at += step) position[i] = at;
    if (++h == call.out_height) h = 0, ++image;
  }
  for (int64_t i = count; i < count + kTile; ++i) position[i] = position[count - 1];
}

template <class Op>
void run_conv2d(const PackedCall& call, const Parallel& parallel) {
  const PackedLayout& layout = *call.weight;
  const int64_t groups = layout.groups, positions = call.out_height * call.out_width;
  if (call.images == 0 || positions == 0) return;
  auto* offsets = room<int64_t>(Scratch::offsets, layout.segments);
  // The last lane reads beyond.
  const CopyPlan plan = plan_copy(call, sizeof(typename Op::Element), 64, offsets);
  const int64_t wave = images_of_wave(call, plan.image, parallel.threads);
  auto* scales = room<RowScale>(Scratch::scales, wave);
  char* activations = room<char>(Scratch::activations, wave * plan.image);
  const int64_t strips = ceil_div(layout.blocks, kStripBlocks);

  for (int64_t first_image = 0; first_image < call.images; first_image += wave) {
    const int64_t images = smaller(call.images - first_image, wave);
    pack_wave<Packer<Op>>(call, plan, parallel, first_image, images, scales, activations);

    const int64_t pixels = images * positions;
    const int64_t chunk = rows_of_task(pixels, plan.pixel, strips * groups, parallel.threads);
    const int64_t work = smaller(chunk, pixels) * kWidth * layout.columns;
    const int64_t tasks = ceil_div(pixels, chunk) * groups * strips;
    parallel_for(parallel, tasks, 1 + kTaskWork / work, [&](int64_t begin, int64_t end) {
      auto* products = room<typename Op::Product>(Scratch::products, chunk * kWidth);
      auto** position = room<const char*>(Scratch::positions, chunk + kTile);
      for (int64_t task = begin; task < end; ++task) {
        const int64_t group = task / strips % groups, first_block = task % strips * kStripBlocks;
        const int64_t first = task / strips / groups * chunk, count = smaller(pixels - first, chunk);
        const int blocks = static_cast<int>(layout.blocks - first_block < kStripBlocks ? 1 : kStripBlocks);
        place_pixels(call, plan, activations + group * plan.plane, first, count, position);
        multiply_strip<Op>(layout, group, first_block, blocks, position, count, offsets, products);
        for (int64_t done = 0; done < count;) {
          const int64_t image = (first + done) / positions, from = (first + done) % positions;
          const int64_t here = smaller(positions - from, count - done);
          finish_pixels<Op>(call, products + done * kWidth, kWidth, first_image + image, from, here, group, first_block,
                            smaller(layout.group_channels - first_block * kBlock, kWidth),
                            Op::kInt8 ? scales[image].scale : 1.0f);
          done += here;
        }
      }
    });
  }
}
