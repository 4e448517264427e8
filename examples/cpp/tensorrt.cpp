// Runs a bundle's TensorRT engine (8.5 or later) on one input file, by tensor names: no bindings, no plugins.
//   g++ -std=c++17 tensorrt.cpp -o run-tensorrt -I/usr/local/cuda/include -L/usr/local/cuda/lib64 -lnvinfer -lcudart
//   ./preprocess ... < photo.ppm | ./run-tensorrt BUNDLE/engines/tensorrt/tensorrt.engine
#include <NvInfer.h>
#include <cuda_runtime_api.h>

#include <fstream>
#include <iostream>
#include <iterator>
#include <memory>
#include <vector>

struct Logger : nvinfer1::ILogger {
    void log(Severity severity, const char* message) noexcept override {
        if (severity <= Severity::kWARNING) std::cerr << message << '\n';
    }
};

static size_t count_of(const nvinfer1::Dims& dims) {
    size_t count = 1;
    for (int i = 0; i < dims.nbDims; ++i) count *= static_cast<size_t>(dims.d[i]);
    return count;
}

int main(int count, char** words) {
    if (count != 2) return std::cerr << "usage: run-tensorrt ENGINE < input.bin\n", 2;
    std::ifstream file(words[1], std::ios::binary);
    const std::vector<char> plan(std::istreambuf_iterator<char>(file), {});
    Logger logger;
    std::unique_ptr<nvinfer1::IRuntime> runtime(nvinfer1::createInferRuntime(logger));
    std::unique_ptr<nvinfer1::ICudaEngine> engine(runtime->deserializeCudaEngine(plan.data(), plan.size()));
    if (!engine) return std::cerr << "built for another GPU or another TensorRT: run build-engine.sh here\n", 1;
    std::unique_ptr<nvinfer1::IExecutionContext> context(engine->createExecutionContext());
    const char *input = nullptr, *output = nullptr;
    for (int i = 0; i < engine->getNbIOTensors(); ++i) {
        const char* name = engine->getIOTensorName(i);
        (engine->getTensorIOMode(name) == nvinfer1::TensorIOMode::kINPUT ? input : output) = name;
    }
    nvinfer1::Dims shape = engine->getTensorShape(input);
    if (shape.d[0] < 0) shape.d[0] = 1;
    context->setInputShape(input, shape);
    std::vector<float> given(count_of(shape)), made(count_of(context->getTensorShape(output)));
    std::cin.read(reinterpret_cast<char*>(given.data()), static_cast<std::streamsize>(given.size() * sizeof(float)));
    void *on_device[2] = {};
    cudaMalloc(&on_device[0], given.size() * sizeof(float));
    cudaMalloc(&on_device[1], made.size() * sizeof(float));
    context->setTensorAddress(input, on_device[0]);
    context->setTensorAddress(output, on_device[1]);
    cudaStream_t stream;
    cudaStreamCreate(&stream);
    cudaMemcpyAsync(on_device[0], given.data(), given.size() * sizeof(float), cudaMemcpyHostToDevice, stream);
    const bool done = context->enqueueV3(stream);
    cudaMemcpyAsync(made.data(), on_device[1], made.size() * sizeof(float), cudaMemcpyDeviceToHost, stream);
    if (!done || cudaStreamSynchronize(stream) != cudaSuccess) return std::cerr << "the engine did not run\n", 1;
    for (float value : made) std::cout << value << '\n';
    cudaFree(on_device[0]);
    cudaFree(on_device[1]);
    cudaStreamDestroy(stream);
    return 0;
}
