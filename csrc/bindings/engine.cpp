// torch.ops.bqnn_cpu: engine_program, engine_run and what tells about programs.
#include <map>
#include <memory>
#include <mutex>
#include <new>
#include <optional>
#include <string>
#include <utility>
#include <vector>

#include "bindings/cpu.h"
#include "cpu/base/pages.h"
#include "cpu/engine/program.h"

namespace bqnn {
namespace {

using engine::Program;
using engine::Shape;

// --- programs by their handles ------------------------------------------------------------------------------------

struct Programs {
  std::mutex mutex;
  std::map<int64_t, std::shared_ptr<const Program>> by_handle;
  int64_t next = 1;
};

Programs& programs() {
  static auto* all = new Programs;  // never destroyed: a thread may still run one when the process ends
  return *all;
}

[[noreturn]] void refuse_handle(int64_t handle) {
  refuse("program", "what engine_program made", std::to_string(handle));
}

std::shared_ptr<const Program> program_of(int64_t handle) {
  Programs& all = programs();
  const std::lock_guard<std::mutex> lock(all.mutex);
  const auto found = all.by_handle.find(handle);
  if (found == all.by_handle.end()) refuse_handle(handle);
  return found->second;
}

// --- reading a description ----------------------------------------------------------------------------------------

// The integers and numbers of a description, one after the other.
class Reader {
 public:
  Reader(const Tensor& words, const Tensor& numbers)
      : words_(counted<int64_t>(words, "words", ScalarType::Long, words.numel())), words_left_(words.numel()),
        numbers_(counted<float>(numbers, "numbers", ScalarType::Float, numbers.numel())),
        numbers_left_(numbers.numel()) {}

  int64_t word() {
    if (words_left_-- <= 0) refuse("words", "a whole description", "its beginning");
    return *words_++;
  }
  float number() {
    if (numbers_left_-- <= 0) refuse("numbers", "those of the description", "too few");
    return *numbers_++;
  }
  int64_t word(int64_t least, int64_t most) {
    const int64_t value = word();
    if (value < least || value > most)
      refuse("words", "integers from " + std::to_string(least) + " to " + std::to_string(most) + " at this place",
             std::to_string(value));
    return value;
  }
  // So many things, of each of which a description has an integer or more.
  int64_t count() { return word(0, words_left_); }
  int32_t index() { return static_cast<int32_t>(word(0, INT32_MAX)); }
  std::vector<int32_t> indices() {
    std::vector<int32_t> all(static_cast<size_t>(count()));
    for (int32_t& each : all) each = index();
    return all;
  }
  void end() const {
    if (words_left_ != 0 || numbers_left_ != 0) refuse("words", "a description and nothing more", "more");
  }

 private:
  const int64_t* words_;
  int64_t words_left_;
  const float* numbers_;
  int64_t numbers_left_;
};

constexpr int64_t kMost = INT64_MAX;

Shape read_shape(Reader* reader) {
  Shape shape;
  shape.channels = reader->word(), shape.height = reader->word(), shape.width = reader->word();
  return shape;
}

int64_t product(std::initializer_list<int64_t> sizes) {
  int64_t all = 1;
  for (const int64_t size : sizes)
    if (size < 0 || __builtin_mul_overflow(all, size, &all)) refuse("words", "sizes that fit 64 bits", "more");
  return all;
}

// The weight of a step whose channels and columns are those of its values; its tensors are as large as that asks.
engine::Weight read_weight(Reader* reader, const std::vector<Tensor>& tensors, int64_t channels, int64_t columns) {
  const auto next = [&]() -> const Tensor* {
    const int64_t i = reader->word(-1, static_cast<int64_t>(tensors.size()) - 1);
    return i < 0 ? nullptr : &tensors[static_cast<size_t>(i)];
  };
  const Tensor *codes = next(), *levels = next(), *integers = next(), *weight = next(), *scale = next(), *bias = next();
  engine::Weight w;
  if (codes != nullptr) {
    const Tensor* books = levels != nullptr ? levels : integers;
    if (books == nullptr || (levels != nullptr && integers != nullptr))
      refuse("tensors", "levels or integers beside codes", "neither, or both");
    if (books->dim() != 2 || books->size(1) < 2 || books->size(1) > kMostLevels || books->size(0) > INT32_MAX)
      refuse("levels", "[codebooks, 2 to 16]", describe(*books));
    w.codebooks = static_cast<int>(books->size(0)), w.num_levels = static_cast<int>(books->size(1));
    if (levels != nullptr) w.levels = counted<float>(*levels, "levels", ScalarType::Float, levels->numel());
    if (integers != nullptr) w.integers = counted<int8_t>(*integers, "integers", ScalarType::Char, integers->numel());
    const int64_t digits = digits_of_byte(w.num_levels);
    const int64_t bytes = columns > 0 ? (columns - 1) / digits + 1 : 0;
    w.codes = shaped<uint8_t>(*codes, "codes", ScalarType::Byte, {channels, bytes});
  }
  if (weight != nullptr && weight->scalar_type() == ScalarType::Char)
    w.integer_numbers = counted<int8_t>(*weight, "weight", ScalarType::Char, product({channels, columns}));
  else if (weight != nullptr)
    w.numbers = counted<float>(*weight, "weight", ScalarType::Float, product({channels, columns}));
  if (scale != nullptr) w.scale = floats(*scale, "scale", channels);
  if (bias != nullptr) w.bias = floats(*bias, "bias", channels);
  return w;
}

engine::Graph read_graph(const Tensor& words, const Tensor& numbers, const std::vector<Tensor>& tensors) {
  Reader reader(words, numbers);
  engine::Graph graph;
  graph.values.resize(static_cast<size_t>(reader.count()));
  for (engine::Value& value : graph.values) {
    value.rank = static_cast<int>(reader.word(1, 3));
    value.shape = read_shape(&reader);
    value.dtype = static_cast<engine::Dtype>(reader.word(0, 1));
    value.zero = static_cast<int>(reader.word(0, 255));
    value.scale = reader.number();
  }
  const auto value_of = [&](int32_t index) -> const engine::Value& {
    if (static_cast<size_t>(index) >= graph.values.size()) refuse("words", "indices of values", std::to_string(index));
    return graph.values[static_cast<size_t>(index)];
  };
  graph.steps.resize(static_cast<size_t>(reader.count()));
  for (engine::Step& step : graph.steps) {
    step.op = static_cast<engine::Op>(reader.word(0, static_cast<int64_t>(engine::Op::count) - 1));
    step.inputs = reader.indices();
    if (step.inputs.empty()) refuse("words", "steps with an input", "one without");
    step.output = reader.index();
    step.activation.function =
        static_cast<engine::Function>(reader.word(0, static_cast<int64_t>(engine::Function::count) - 1));
    step.activation.low = reader.number(), step.activation.high = reader.number();
    engine::Window& w = step.window;
    for (int64_t* size : {&w.kernel_h, &w.kernel_w, &w.stride_h, &w.stride_w, &w.top, &w.bottom, &w.left, &w.right,
                          &w.dilation_h, &w.dilation_w})
      *size = reader.word(0, INT32_MAX);
    w.ceil = reader.word(0, 1) != 0, w.count_padding = reader.word(0, 1) != 0;
    w.divisor = reader.word(0, kMost);
    step.groups = reader.word(1, INT32_MAX);
    step.low = read_shape(&reader), step.high = read_shape(&reader), step.step = read_shape(&reader);
    step.number = reader.number();
    const Shape &x = value_of(step.inputs[0]).shape, &y = value_of(step.output).shape;
    int64_t columns = 0;
    if (step.op == engine::Op::conv2d) columns = product({x.channels / step.groups, w.kernel_h, w.kernel_w});
    if (step.op == engine::Op::linear) columns = product({x.channels, x.height, x.width});
    step.weight = read_weight(&reader, tensors, y.channels, columns);
  }
  graph.inputs = reader.indices(), graph.outputs = reader.indices();
  reader.end();
  return graph;
}

std::shared_ptr<const Program> make_program(engine::Graph graph, const engine::Limits& limits) {
  try {
    return std::make_shared<const Program>(std::move(graph), isa(), limits);
  } catch (const std::invalid_argument& error) {
    refuse("words", "those of a sound graph", std::string("one that is not: ") + error.what());
  } catch (const std::bad_alloc&) {
    refuse("words", "those of a graph that memory holds", "a larger one");
  }
}

int64_t engine_program_op(Tensor words, Tensor numbers, std::vector<Tensor> tensors, int64_t cache,
                          int64_t kept_panels, int64_t wide_layer, int64_t team) {
  require(cache >= 0, "cache", "a number of bytes", cache);
  require(kept_panels >= 0, "kept_panels", "a number of bytes", kept_panels);
  require(wide_layer >= 0, "wide_layer", "a number of weights", wide_layer);
  require(team >= 0, "team", "a number of threads", team);
  auto program = make_program(read_graph(words, numbers, tensors), {cache, kept_panels, wide_layer, team});
  Programs& all = programs();
  const std::lock_guard<std::mutex> lock(all.mutex);
  all.by_handle.emplace(all.next, std::move(program));
  return all.next++;
}

void engine_free_op(int64_t handle) {
  std::shared_ptr<const Program> last;  // destroyed when the lock is not held any more
  Programs& all = programs();
  const std::lock_guard<std::mutex> lock(all.mutex);
  const auto found = all.by_handle.find(handle);
  if (found == all.by_handle.end()) refuse_handle(handle);
  last = std::move(found->second);
  all.by_handle.erase(found);
}

// --- running ------------------------------------------------------------------------------------------------------

struct Tensors {
  std::vector<engine::Outside> inputs, outputs;
  std::vector<Tensor> results;
  int64_t images;
};

bool is_shape(const Tensor& x, const engine::Value& value) {
  const Shape& s = value.shape;
  if (value.rank == 1) return x.dim() == 2 && x.size(1) == s.channels;
  return x.dim() == 4 && x.size(1) == s.channels && x.size(2) == s.height && x.size(3) == s.width;
}

engine::Outside outside(const Tensor& x, const char* name, const engine::Value& value) {
  const bool bytes = dtype_of(x) == ScalarType::Byte;
  auto* data = static_cast<char*>(data_of(x, name));
  if (value.rank == 1) return {data, bytes, x.stride(0), x.stride(1), 0, 0};
  return {data, bytes, x.stride(0), x.stride(1), x.stride(2), x.stride(3)};
}

Tensors prepare(const Program& program, const std::vector<Tensor>& inputs) {
  const engine::Graph& graph = program.graph();
  require(inputs.size() == graph.inputs.size(), "inputs", "as many tensors as the program has",
          static_cast<int64_t>(inputs.size()));
  Tensors all;
  all.images = -1;
  for (size_t i = 0; i < inputs.size(); ++i) {
    const Tensor& x = inputs[i];
    const engine::Value& value = graph.values[graph.inputs[i]];
    const bool dtype = dtype_of(x) == ScalarType::Float || dtype_of(x) == ScalarType::Byte;
    if (!dtype || !x.is_cpu() || !is_shape(x, value) || (all.images >= 0 && x.size(0) != all.images)) {
      const Shape& s = value.shape;
      refuse("inputs", "float32 or uint8 on the CPU of one batch, " +
                           (value.rank == 1 ? shape_text(std::vector<int64_t>{kAny, s.channels})
                                            : shape_text(std::vector<int64_t>{kAny, s.channels, s.height, s.width})),
             describe(x));
    }
    all.images = x.size(0);
    all.inputs.push_back(outside(x, "inputs", value));
  }
  require(all.images <= program.most_images(), "inputs", "a batch that memory holds", all.images);
  for (const int32_t v : graph.outputs) {
    const engine::Value& value = graph.values[v];
    const Shape& s = value.shape;
    const int64_t size[] = {all.images, s.channels, s.height, s.width};
    const int64_t stride[] = {s.count(), s.height * s.width, s.width, 1};
    AtenTensorHandle handle;
    if (aoti_torch_empty_strided(value.rank == 1 ? 2 : 4, size, stride, aoti_torch_dtype_float32(),
                                 aoti_torch_device_type_cpu(), 0, &handle) != AOTI_TORCH_SUCCESS)
      throw std::bad_alloc();
    Tensor y(handle);
    prefer_huge_pages(y.mutable_data_ptr(), static_cast<size_t>(y.numel()) * 4);
    all.outputs.push_back(outside(y, "outputs", value));
    all.results.push_back(std::move(y));
  }
  return all;
}

std::vector<Tensor> run(const Program& program, const std::vector<Tensor>& inputs, double* seconds) {
  try {
    Tensors all = prepare(program, inputs);
    program.run(all.inputs.data(), all.outputs.data(), all.images, torch_threads(), seconds);
    return std::move(all.results);
  } catch (const std::bad_alloc&) {
    refuse("inputs", "a batch that memory holds", inputs.empty() ? "none" : describe(inputs[0]));
  }
}

std::vector<Tensor> engine_run_op(int64_t handle, std::vector<Tensor> inputs) {
  return run(*program_of(handle), inputs, nullptr);
}

// Where no tensor is on the CPU: torch looks for a kernel by the tensors, and finds no other for an empty list.
std::vector<Tensor> refuse_run_op(int64_t handle, std::vector<Tensor> inputs) {
  program_of(handle);
  refuse("inputs", "tensors on the CPU", inputs.empty() ? "none" : "others");
}
Tensor refuse_times_op(int64_t handle, std::vector<Tensor> inputs) {
  refuse_run_op(handle, std::move(inputs));
  return {};
}

// Seconds of each instruction, over all threads, and how many products it takes for an image.
Tensor engine_times_op(int64_t handle, std::vector<Tensor> inputs) {
  const std::shared_ptr<const Program> program = program_of(handle);
  const auto& list = program->plan().instructions;
  std::vector<double> seconds(list.size(), 0.0);
  run(*program, inputs, seconds.data());
  const int64_t size[] = {static_cast<int64_t>(list.size()), 2}, stride[] = {2, 1};
  AtenTensorHandle made;
  TORCH_ERROR_CODE_CHECK(aoti_torch_empty_strided(2, size, stride, aoti_torch_dtype_float64(),
                                                  aoti_torch_device_type_cpu(), 0, &made));
  Tensor table(made);
  auto* to = static_cast<double*>(table.mutable_data_ptr());
  for (size_t i = 0; i < list.size(); ++i) {
    to[2 * i] = seconds[i];
    to[2 * i + 1] = static_cast<double>(program->products(list[i]));
  }
  return table;
}

// A line an instruction: the index of its step, or -1, and what it is for so many images; and the bytes of an image in the arenas.
std::string engine_describe_op(int64_t handle, int64_t images) {
  const std::shared_ptr<const Program> program = program_of(handle);
  require(images >= 0 && images <= program->most_images(), "images", "a batch that memory holds", images);
  std::string text = std::to_string(program->plan().local) + " " + std::to_string(program->plan().shared) + "\n";
  for (const engine::Instruction& each : program->plan().instructions) {
    const bool of_step = each.kind != engine::Kind::read && each.kind != engine::Kind::write;
    text += std::to_string(of_step ? each.step : -1) + " " + program->describe(each, images) + "\n";
  }
  return text;
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(bqnn_cpu, m) {
  m.def(
      "engine_program(Tensor words, Tensor numbers, Tensor[] tensors, int cache=1048576, int kept_panels=1048576,"
      " int wide_layer=131072, int team=2) -> int");
  m.def("engine_free(int program) -> ()");
  m.def("engine_run(int program, Tensor[] inputs) -> Tensor[]");
  m.def("engine_times(int program, Tensor[] inputs) -> Tensor");
  m.def("engine_describe(int program, int images=1) -> str");
}

STABLE_TORCH_LIBRARY_IMPL(bqnn_cpu, CPU, m) {
  m.impl("engine_program", TORCH_BOX(&engine_program_op));
  m.impl("engine_run", TORCH_BOX(&engine_run_op));
  m.impl("engine_times", TORCH_BOX(&engine_times_op));
}

STABLE_TORCH_LIBRARY_IMPL(bqnn_cpu, CompositeExplicitAutograd, m) {
  m.impl("engine_free", TORCH_BOX(&engine_free_op));
  m.impl("engine_run", TORCH_BOX(&refuse_run_op));
  m.impl("engine_times", TORCH_BOX(&refuse_times_op));
  m.impl("engine_describe", TORCH_BOX(&engine_describe_op));
}

}  // namespace bqnn
