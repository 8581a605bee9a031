// mechanic_fused._native: the ops and their arguments. Addresses are passed as integers: nothing
// here depends on torch. The GIL is released around every op.
#include <pybind11/pybind11.h>

#include "columns.h"
#include "cpu/cpu.h"
#ifdef MECHANIC_CUDA
#include "cuda/cuda.h"
#endif

namespace py = pybind11;
using namespace mechanic;

namespace {

template <class T>
T* pointer(int64_t address) {
  return reinterpret_cast<T*>(address);
}

Tables make_tables(int64_t tensors, int64_t chunks, int64_t hyper, int64_t partials, int64_t sums) {
  return {pointer<const Tensor>(tensors), pointer<const Chunk>(chunks), pointer<const Hyper>(hyper),
          pointer<Sums>(partials), pointer<Sums>(sums)};
}

Vectors make_vectors(int64_t streams, int64_t chunks, int64_t partials, int64_t chunk_count,
                     int64_t elements, int64_t dtype) {
  return {pointer<const VectorStreams>(streams),
          pointer<const Chunk>(chunks),
          pointer<Partial>(partials),
          chunk_count,
          elements,
          DType(dtype)};
}

Tuner make_tuner(int64_t state, int64_t constants, int64_t scales, int64_t betas) {
  return {pointer<double>(state), pointer<const double>(constants), scales, betas};
}

template <size_t kCount>
py::tuple names(const Column (&columns)[kCount]) {
  py::tuple found(kCount);
  for (const Column& column : columns) found[column.index] = column.name;
  return found;
}

// Table or enumeration in backends/layout.py -> the names that chunk.h has for it.
py::dict layout() {
  py::dict found;
  found["TENSOR"] = names(kTensorColumns);
  found["CHUNK"] = names(kChunkColumns);
  found["SPAN"] = names(kSpanColumns);
  found["HYPER"] = names(kHyperColumns);
  found["SUMS"] = names(kSumsColumns);
  found["TUNER"] = names(kTunerColumns);
  found["COUNTERS"] = names(kCounterColumns);
  found["CONSTANTS"] = names(kConstantColumns);
  found["LOG_TUNER"] = names(kLogTunerColumns);
  found["LOG_CONSTANTS"] = names(kLogConstantColumns);
  found["LOSSES"] = names(kLossesColumns);
  found["KINDS"] = names(kKinds);
  found["STORED_DTYPES"] = names(kDTypes);
  found["REFERENCE_BLOCK"] = kReferenceBlock;
  found["REFERENCE_PERIOD"] = kReferencePeriod;
  found["MOST_SCALE"] = kMostScale;
  return found;
}

#ifdef MECHANIC_CUDA
void define_cuda(py::module_ m) {
  using namespace cuda;
  py::class_<Reduction>(m, "Reduction")
      .def(py::init([](int64_t spans, int64_t tickets) {
             return Reduction{pointer<const Span>(spans), pointer<unsigned>(tickets)};
           }),
           py::kw_only(), py::arg("spans"), py::arg("tickets"));
  py::class_<StepScalars>(m, "StepScalars")
      .def(py::init([](int64_t grad_scale, int64_t found_inf, int64_t clip, int64_t step_count) {
             return StepScalars{pointer<const float>(grad_scale), pointer<const float>(found_inf),
                                pointer<const double>(clip), pointer<const double>(step_count)};
           }),
           py::kw_only(), py::arg("grad_scale"), py::arg("found_inf"), py::arg("clip") = 0,
           py::arg("step_count") = 0);
  m.def("ticket_count", &ticket_count, py::arg("chunk_count"), py::arg("scale_count"));

  const auto released = py::call_guard<py::gil_scoped_release>();
  m.def(
      "accumulate",
      [](const Bucket& bucket, const Reduction& reduction, const StepScalars& scalars,
         int64_t stream) { accumulate(bucket, reduction, scalars, pointer<CUstream_st>(stream)); },
      py::arg("bucket"), py::arg("reduction"), py::arg("scalars"), py::arg("stream"), released);
  m.def(
      "norm",
      [](const Bucket& bucket, const Reduction& reduction, const StepScalars& scalars,
         int64_t stream) { norm(bucket, reduction, scalars, pointer<CUstream_st>(stream)); },
      py::arg("bucket"), py::arg("reduction"), py::arg("scalars"), py::arg("stream"), released);
  m.def(
      "tune",
      [](int64_t sums, const Tuner& tuner, const StepScalars& scalars, int64_t stream) {
        tune(pointer<const Sums>(sums), tuner, scalars, pointer<CUstream_st>(stream));
      },
      py::arg("sums"), py::arg("tuner"), py::arg("scalars"), py::arg("stream"), released);
  m.def(
      "apply",
      [](const Bucket& bucket, const Reduction& reduction, const Tuner& tuner,
         const StepScalars& scalars, int64_t stream) {
        apply(bucket, reduction, tuner, scalars, pointer<CUstream_st>(stream));
      },
      py::arg("bucket"), py::arg("reduction"), py::arg("tuner"), py::arg("scalars"),
      py::arg("stream"), released);
  m.def(
      "step",
      [](const Bucket& bucket, const Reduction& reduction, const LogTuner& tuner,
         const StepScalars& scalars,
         int64_t stream) { step(bucket, reduction, tuner, scalars, pointer<CUstream_st>(stream)); },
      py::arg("bucket"), py::arg("reduction"), py::arg("tuner"), py::arg("scalars"),
      py::arg("stream"), released);
  m.def(
      "muon_momentum",
      [](const Bucket& bucket, const Reduction& reduction, const Directions& n,
         const StepScalars& scalars, int64_t stream) {
        muon_momentum(bucket, reduction, n, scalars, pointer<CUstream_st>(stream));
      },
      py::arg("bucket"), py::arg("reduction"), py::arg("n"), py::arg("scalars"), py::arg("stream"),
      released);
  m.def(
      "muon_update",
      [](const Bucket& bucket, const Reduction& reduction, const Directions& o, double ratio,
         const LogTuner& tuner, const StepScalars& scalars, int64_t stream) {
        muon_update(bucket, reduction, o, ratio, tuner, scalars, pointer<CUstream_st>(stream));
      },
      py::arg("bucket"), py::arg("reduction"), py::arg("o"), py::arg("ratio"), py::arg("tuner"),
      py::arg("scalars"), py::arg("stream"), released);
  m.def(
      "log_tune",
      [](int64_t sums, const LogTuner& tuner, const StepScalars& scalars, int64_t stream) {
        log_tune(pointer<const Sums>(sums), tuner, scalars, pointer<CUstream_st>(stream));
      },
      py::arg("sums"), py::arg("tuner"), py::arg("scalars"), py::arg("stream"), released);
  m.def(
      "measure",
      [](const Bucket& bucket, const Reduction& reduction, int64_t stream) {
        measure(bucket, reduction, pointer<CUstream_st>(stream));
      },
      py::arg("bucket"), py::arg("reduction"), py::arg("stream"), released);
}
#endif

}  // namespace

PYBIND11_MODULE(_native, m) {
  m.doc() = "The ops over tables of addresses, called by backends/cpp.py and backends/cuda.py.";
  m.attr("layout") = layout();
  py::class_<Tables>(m, "Tables")
      .def(py::init(&make_tables), py::kw_only(), py::arg("tensors"), py::arg("chunks"),
           py::arg("hyper"), py::arg("partials"), py::arg("sums"));
  py::class_<Counts>(m, "Counts")
      .def(py::init([](int64_t tensors, int64_t chunks, int64_t scales, int64_t elements,
                       int64_t in_part, int64_t state_block) {
             return Counts{tensors, chunks, scales, elements, in_part, state_block};
           }),
           py::kw_only(), py::arg("tensors"), py::arg("chunks"), py::arg("scales"),
           py::arg("elements"), py::arg("in_part"), py::arg("state_block"));
  py::class_<DTypes>(m, "DTypes")
      .def(py::init([](int64_t weight, int64_t state, int64_t delta) {
             return DTypes{DType(weight), DType(state), DType(delta)};
           }),
           py::kw_only(), py::arg("weight"), py::arg("state"), py::arg("delta"));
  py::class_<Bucket>(m, "Bucket")
      .def(
          py::init([](const Tables& tables, const Counts& counts, int64_t kind,
                      const DTypes& dtypes) { return Bucket{tables, counts, Kind(kind), dtypes}; }),
          py::kw_only(), py::arg("tables"), py::arg("counts"), py::arg("kind"), py::arg("dtypes"));
  py::class_<Tuner>(m, "Tuner")
      .def(py::init(&make_tuner), py::kw_only(), py::arg("state"), py::arg("constants"),
           py::arg("scales"), py::arg("betas"));
  py::class_<LogTuner>(m, "LogTuner")
      .def(py::init([](int64_t rows, int64_t constants, int64_t losses, int64_t scales) {
             return LogTuner{pointer<LogRow>(rows), pointer<const LogConstants>(constants),
                             pointer<Losses>(losses), scales};
           }),
           py::kw_only(), py::arg("rows"), py::arg("constants"), py::arg("losses"),
           py::arg("scales"));
  py::class_<Directions>(m, "Directions")
      .def(py::init([](int64_t first, int64_t size, int64_t dtype) {
             return Directions{pointer<void>(first), size, DType(dtype)};
           }),
           py::kw_only(), py::arg("first"), py::arg("size"), py::arg("dtype"));
  py::class_<Vectors>(m, "Vectors")
      .def(py::init(&make_vectors), py::kw_only(), py::arg("streams"), py::arg("chunks"),
           py::arg("partials"), py::arg("chunk_count"), py::arg("elements"), py::arg("dtype"));
  py::class_<AdaRemOptions>(m, "AdaRemOptions")
      .def(py::init([](double lr, double beta, double boost, double decay, double eps) {
             return AdaRemOptions{lr, beta, boost, decay, eps};
           }),
           py::kw_only(), py::arg("lr"), py::arg("beta"), py::arg("boost"), py::arg("decay"),
           py::arg("eps"));

  const auto released = py::call_guard<py::gil_scoped_release>();
  auto cpu = m.def_submodule("cpu", "The ops on the CPU.");
  cpu.def(
      "accumulate",
      [](const Bucket& bucket, int64_t clip, int64_t step_count, int threads) {
        cpu::accumulate(bucket, pointer<const double>(clip), pointer<const double>(step_count),
                        threads);
      },
      py::arg("bucket"), py::arg("clip"), py::arg("step_count"), py::arg("threads"), released);
  cpu.def(
      "step",
      [](const Bucket& bucket, const LogTuner& tuner, int64_t clip, int64_t step_count,
         int threads) {
        cpu::step(bucket, tuner, pointer<const double>(clip), pointer<const double>(step_count),
                  threads);
      },
      py::arg("bucket"), py::arg("tuner"), py::arg("clip"), py::arg("step_count"),
      py::arg("threads"), released);
  cpu.def(
      "muon_momentum",
      [](const Bucket& bucket, const Directions& n, int64_t clip, int64_t step_count, int threads) {
        cpu::muon_momentum(bucket, n, pointer<const double>(clip),
                           pointer<const double>(step_count), threads);
      },
      py::arg("bucket"), py::arg("n"), py::arg("clip"), py::arg("step_count"), py::arg("threads"),
      released);
  cpu.def(
      "muon_update",
      [](const Bucket& bucket, const Directions& o, double ratio, const LogTuner& tuner,
         int64_t step_count, int threads) {
        cpu::muon_update(bucket, o, ratio, tuner, pointer<const double>(step_count), threads);
      },
      py::arg("bucket"), py::arg("o"), py::arg("ratio"), py::arg("tuner"), py::arg("step_count"),
      py::arg("threads"), released);
  cpu.def(
      "log_tune",
      [](int64_t sums, const LogTuner& tuner) { cpu::log_tune(pointer<const Sums>(sums), tuner); },
      py::arg("sums"), py::arg("tuner"), released);
  cpu.def("norm", &cpu::norm, py::arg("bucket"), py::arg("threads"), released);
  cpu.def("apply", &cpu::apply, py::arg("bucket"), py::arg("tuner"), py::arg("threads"), released);
  cpu.def("measure", &cpu::measure, py::arg("bucket"), py::arg("threads"), released);
  cpu.def(
      "tune", [](int64_t sums, const Tuner& tuner) { cpu::tune(pointer<const Sums>(sums), tuner); },
      py::arg("sums"), py::arg("tuner"), released);
  cpu.def(
      "step_along",
      [](const Vectors& vectors, int64_t c, int threads) {
        cpu::step_along(vectors, pointer<const double>(c), threads);
      },
      py::arg("vectors"), py::arg("c"), py::arg("threads"), released);
  cpu.def("axpby", &cpu::axpby, py::arg("vectors"), py::arg("a"), py::arg("c"), py::arg("threads"),
          released);
  cpu.def("difference_dots", &cpu::difference_dots, py::arg("vectors"), py::arg("threads"),
          released);
  cpu.def("dots", &cpu::dots, py::arg("vectors"), py::arg("threads"), released);
  cpu.def("abs_max", &cpu::abs_max, py::arg("vectors"), py::arg("threads"), released);
  cpu.def(
      "adarem",
      [](const Vectors& vectors, const AdaRemOptions& options, int64_t peaks, int threads) {
        cpu::adarem(vectors, options, pointer<const double>(peaks), threads);
      },
      py::arg("vectors"), py::arg("options"), py::arg("peaks"), py::arg("threads"), released);
  cpu.def("instruction_set", &cpu::instruction_set);

#ifdef MECHANIC_CUDA
  define_cuda(m.def_submodule("cuda", "The ops on a GPU, on a stream given as an integer."));
  m.attr("has_cuda") = true;
#else
  m.attr("has_cuda") = false;
#endif
}
