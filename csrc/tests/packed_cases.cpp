// Draws packed layers and compares every instruction set of this machine with a plain loop in double.
//
// "int8" has to have the bits of the rule of the Python reference. "fp32" and "bf16" may be off, in each output, by
// kTolerance times the sum of the magnitudes it is made of, and as a whole by kTolerance times its norm; outputs that
// are one weight have to be exact. NaN and infinity have to be in the outputs whose operands hold them, and in no
// other. The number of threads must not change a bit.
#include <map>

#include "cpu/packed/select.h"
#include "packed_expect.h"

namespace bqnn::cases {
namespace {

// How often each kernel of the tables ran.
std::map<std::string, int> runs_of;

// --- running ------------------------------------------------------------------------------------------------------

// Base-M digits, the first the least significant, each channel padded to a whole byte.
std::vector<uint8_t> pack(const Case& c, const Operands& o) {
  int digits = 1;
  for (int values = c.num_levels; values * c.num_levels <= 256; values *= c.num_levels) ++digits;
  const int64_t columns = c.columns(), width = (columns + digits - 1) / digits;
  std::vector<uint8_t> packed(c.channels() * width);
  for (int64_t i = 0; i < c.channels() * width; ++i) {
    const int64_t channel = i / width, first = i % width * digits;
    int byte = 0;
    for (int64_t k = std::min(first + digits, columns) - 1; k >= first; --k) {
      byte = byte * c.num_levels + o.code(c, channel, k);
    }
    packed[i] = static_cast<uint8_t>(byte);
  }
  return packed;
}

PackedWeight weight_of(const Case& c, const Operands& o, const uint8_t* codes) {
  const bool int8 = c.precision == Precision::int8;
  return {codes,
          o.levels.data(),
          int8 ? o.int8_levels.data() : nullptr,
          int8 ? o.int8_scale.data() : nullptr,
          c.channels(),
          c.columns(),
          c.groups,
          c.num_levels,
          static_cast<int>(o.int8_scale.size()),
          c.kernel.h,
          c.kernel.w,
          c.dilation.w,
          c.precision,
          !c.per_channel && c.num_levels <= 3 && c.precision == Precision::fp32 ? LayoutForm::sum_indices
                                                                               : LayoutForm::words};
}

// x and y of a case in memory; what is not of the case holds NaN.
struct Memory {
  Buffer<unsigned char> bytes;
  int64_t width;  // bytes of an element

  Memory(const Place& place, int64_t images, int64_t channels, int64_t pixels)
      : bytes(images * place.all(channels) * pixels * (place.bfloat16 ? 2 : 4)), width(place.bfloat16 ? 2 : 4) {}

  void set(int64_t at, float value) {
    const uint32_t bits = width == 2 ? to_bfloat16(value) : bits_of(value);
    std::memcpy(bytes.data() + at * width, &bits, static_cast<size_t>(width));  // little endian
  }
  float take(int64_t at) {
    uint32_t bits = 0;
    std::memcpy(&bits, bytes.data() + at * width, static_cast<size_t>(width));
    std::memset(bytes.data() + at * width, 0xFF, static_cast<size_t>(width));
    return width == 2 ? widen(static_cast<Bfloat16>(bits)) : from_bits(bits);
  }
  // Whether nothing was written but what has been taken.
  bool untouched() const {
    const unsigned char *begin = bytes.data(), *end = begin + bytes.size();
    return bytes.intact() && std::all_of(begin, end, [](unsigned char byte) { return byte == 0xFF; });
  }
};

std::string run_on(const Case& c, const Operands& o, const PackedLayout* layout, Isa isa, int threads,
                   std::vector<float>* found) {
  Memory x(c.x, c.images, c.all_inputs(), c.in_pixels()), y(c.y, c.images, c.channels(), c.pixels());
  for (size_t i = 0; i < o.x.size(); ++i) x.set(c.x.at(static_cast<int64_t>(i), c.all_inputs(), c.in_pixels()), o.x[i]);
  const Buffer<float> bias(static_cast<int64_t>(o.bias.size()));
  std::copy(o.bias.begin(), o.bias.end(), bias.data());
  const PackedCall call{layout,
                        c.x.view(x.bytes.data(), c.all_inputs(), c.in_pixels()),
                        c.y.view(y.bytes.data(), c.channels(), c.pixels()),
                        bias.data(),
                        c.relu ? Activation::relu : Activation::none,
                        c.images,
                        c.height,
                        c.width,
                        c.out_height,
                        c.out_width,
                        c.stride.h,
                        c.stride.w,
                        c.padding.h,
                        c.padding.w,
                        c.dilation.h};
  const PackedOp op = c.conv ? PackedOp::conv2d : PackedOp::linear;
  const std::string name = run_packed(op, isa, call, std_threads(threads));
  ++runs_of[name];
  found->resize(c.images * c.channels() * c.pixels());
  for (size_t i = 0; i < found->size(); ++i)
    (*found)[i] = y.take(c.y.at(static_cast<int64_t>(i), c.channels(), c.pixels()));
  return y.untouched() ? "" : name + ": wrote beside y";
}

// Changes one number of a header. The layout has to be refused, or to be one that no kernel reads beyond.
std::string run_altered(Random* random, const Case& c, const Operands& o, const Buffer<unsigned char>& memory) {
  const Buffer<unsigned char> altered(memory.size());
  std::memcpy(altered.data(), memory.data(), static_cast<size_t>(memory.size()));
  const int64_t at = random->between(0, sizeof(PackedLayout) / 4 - 1) * 4;
  const int32_t value = static_cast<int32_t>(random->chance(70) ? random->between(-2, 40) : random->next());
  std::memcpy(altered.data() + at, &value, sizeof value);
  const PackedLayout* layout = view_layout(altered.data(), static_cast<size_t>(altered.size()));
  if (layout == nullptr) return "";
  // What the bindings check of a call.
  if (layout->channels != c.channels() || layout->columns != c.columns() || layout->groups != c.groups) return "";
  if (layout->kernel_h != c.kernel.h || layout->kernel_w != c.kernel.w) return "";
  if (layout->kernel_w > 1 && layout->dilation_w != c.dilation.w) return "";
  std::vector<float> found;
  for (const Isa isa : isas()) {
    const std::string wrong = run_on(c, o, layout, isa, 1, &found);
    if (!wrong.empty()) return "an altered layout: " + wrong;
  }
  return "";
}

std::string run_all(Random* random, const Case& c, const Operands& o) {
  const std::vector<uint8_t> codes = pack(c, o);
  const PackedWeight weight = weight_of(c, o, codes.data());
  const Buffer<unsigned char> memory(plan_layout(weight).bytes);
  make_layout(weight, memory.data());
  const PackedLayout* layout = view_layout(memory.data(), static_cast<size_t>(memory.size()));
  if (layout == nullptr) return "make_layout made no layout";
  const Expected expected = expect(c, o);
  for (const Isa isa : isas()) {
    const std::string name = std::string(isa_name(isa)) + ": ";
    std::vector<float> found, threaded;
    std::string wrong = run_on(c, o, layout, isa, 1, &found);
    if (wrong.empty()) wrong = compare(c, expected, found, isa);
    if (wrong.empty() && c.threads > 1) {
      wrong = run_on(c, o, layout, isa, c.threads, &threaded);
      const size_t size = found.size() * sizeof(float);
      const bool differ = size > 0 && std::memcmp(found.data(), threaded.data(), size) != 0;
      if (wrong.empty() && differ)
        wrong = "another result with " + std::to_string(c.threads) + " threads";
    }
    if (!wrong.empty()) return name + wrong;
  }
  return run_altered(random, c, o, memory);
}

std::string run_case(uint64_t seed, uint64_t number) {
  Random random(seed, number);
  const Case c = draw_case(&random);
  const Operands o = draw_operands(&random, c);
  const std::string wrong = run_all(&random, c, o);
  return wrong.empty() ? wrong : c.text() + ": " + wrong;
}

std::string closing() {
  std::string text = "; largest error as a share of the bound:";
  for (const Isa isa : isas()) {
    char number[40];
    std::snprintf(number, sizeof number, " %s %.3f", isa_name(isa), worst[static_cast<int>(isa)]);
    text += number;
  }
  text += "\nkernels that ran:";
  for (const auto& [name, count] : runs_of) text += "\n  " + std::to_string(count) + " " + name;
  return text;
}

}  // namespace
}  // namespace bqnn::cases

int main(int argc, char** argv) {
  return bqnn::cases::run_cases(argc, argv, 6000, bqnn::cases::run_case, bqnn::cases::closing);
}
